"""Reads `alerts.toml`: whom a run's server tells of its events. It stays with the coordinator; no site is sent it.

    kinds = ["left-out", "failed"]        all kinds of events when left out
    certificates = ["/etc/panfm/server.pem"]

    [webhook]                             POST of JSON; `text` is what Slack and Mattermost show
    url-file = "/etc/panfm/webhook-url"   or url-env = "NAME"; url = "..." where the address is no secret

    [mail]
    host = "smtp.example.org"
    sender = "panfm@example.org"
    to = ["coordinator@example.org"]
    user = "panfm"
    password-file = "/etc/panfm/smtp-password"

Secrets are named, by file or environment variable of the ServerApp, and read when an alert goes out.
"""

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from panfm.config import parse_table
from panfm.config.base import Config
from panfm.errors import ConfigError, reason
from panfm.report.run_events import EventKind
from panfm.texts import parse_toml

FILE = "alerts.toml"
_Address = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]
_WEB_ADDRESS = "expected an address that begins with https:// or http://, without spaces and control characters"


class WebhookConfig(Config):
    """Where alerts are posted."""

    url: str | None = None
    url_env: str | None = None
    url_file: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> "WebhookConfig":
        if sum(value is not None for value in (self.url, self.url_env, self.url_file)) != 1:
            raise ValueError("expected one of url, url-env and url-file")
        if self.url is not None and not _is_web_address(self.url):
            raise ValueError(f"url: {_WEB_ADDRESS}")
        return self

    def address(self) -> str:
        """The URL. Raises ConfigError, which does not tell it, if it cannot be read or is none of http or https."""
        url = self.url or _secret("webhook.url", self.url_env, self.url_file)
        if not _is_web_address(url):
            raise ConfigError(f"webhook: {_WEB_ADDRESS}")
        return url


class MailConfig(Config):
    """The mail server, and who is written to."""

    host: str
    port: Annotated[int, Field(gt=0, lt=65536)] = 587
    tls: Literal["starttls", "tls", "none"] = "starttls"
    root_certificates: str | None = None
    """Certificate authority of the mail server; those of the system when left out."""
    sender: _Address
    to: Annotated[tuple[_Address, ...], Field(strict=False, min_length=1)]
    user: str | None = None
    password_env: str | None = None
    password_file: str | None = None

    @model_validator(mode="after")
    def _one_password(self) -> "MailConfig":
        given = sum(value is not None for value in (self.password_env, self.password_file))
        if given != (self.user is not None):
            raise ValueError("expected user with one of password-env and password-file, or none of them")
        if self.user is not None and self.tls == "none":
            raise ValueError('tls = "none" would send the password in clear, expected "starttls" or "tls"')
        return self

    def password(self) -> str:
        """The password. Raises ConfigError if it cannot be read."""
        return _secret("mail.password", self.password_env, self.password_file)


class AlertsConfig(Config):
    """Whom a run's server tells of which events."""

    kinds: Annotated[tuple[Annotated[EventKind, Field(strict=False)], ...], Field(strict=False)] = tuple(EventKind)
    certificates: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """PEM files whose end is watched."""
    webhook: WebhookConfig | None = None
    mail: MailConfig | None = None

    def check_secrets(self) -> None:
        """Read the secrets that are named. Raises ConfigError if one cannot be read here."""
        if self.webhook:
            self.webhook.address()
        if self.mail and self.mail.user is not None:
            self.mail.password()


def parse_alerts(text: str, where: str) -> AlertsConfig:
    """Read a description of alerts. Raises ConfigError with a line for each fault."""
    return parse_table(AlertsConfig, parse_toml(text, where), where, key="alerts")


def read_alerts(path: Path) -> AlertsConfig:
    """Read a file of alerts. Raises ConfigError as `parse_alerts`, or if it cannot be read."""
    try:
        return parse_alerts(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}), expected a description of alerts") from error


def _is_web_address(url: str) -> bool:
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _secret(key: str, variable: str | None, file: str | None) -> str:
    try:
        text = os.environ.get(variable, "") if variable else Path(file or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} cannot be read ({reason(error)})") from error
    if not text.strip():
        raise ConfigError(f"{key}: {variable or file} is empty or not there, expected the secret")
    return text.strip()
