"""Sends one alert: by a POST of JSON to a webhook, or by mail."""

import json
import smtplib
import ssl
import urllib.request
from collections.abc import Mapping
from email.message import EmailMessage
from http.client import HTTPException

from panfm.errors import PanfmError, one_line, reason
from panfm.report.run_events import Event
from server.alerts_config import MailConfig, WebhookConfig

TIMEOUT_S = 20.0
FAILURES = (OSError, smtplib.SMTPException, HTTPException, ValueError, PanfmError)
"""Errors that `post` and `write_mail` raise."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for a failure: followed, it would become a GET without the alert."""

    def redirect_request(self, *_: object) -> None:
        """Follow none; urllib then raises HTTPError."""


def why_failed(error: BaseException) -> str:
    """Say in one line why an alert did not go out, without the address, which urllib's own words may quote."""
    return type(error).__name__ if isinstance(error, (HTTPException, ValueError)) else reason(error)


def told(name: str, event: Event) -> str:
    """An event in one line."""
    subject = " ".join(filter(None, (event.kind.value, event.site)))
    return one_line(f"{name}: {subject}: {event.words} (round {event.round})", 500)


def post(webhook: WebhookConfig, name: str, number: int, event: Event) -> None:
    """Post an alert as JSON. Raises OSError, HTTPException, ValueError or ConfigError."""
    content: Mapping[str, object] = {
        "text": told(name, event),
        "name": name,
        "number": number,
        "event": event.model_dump(mode="json"),
    }
    headers = {"Content-Type": "application/json", "User-Agent": "panfm"}
    request = urllib.request.Request(webhook.address(), json.dumps(content).encode(), headers, method="POST")
    with urllib.request.build_opener(_NoRedirect()).open(request, timeout=TIMEOUT_S):
        pass


def write_mail(mail: MailConfig, name: str, number: int, event: Event) -> None:
    """Send an alert by mail. Raises OSError, SMTPException or ConfigError."""
    message = EmailMessage()
    message["Subject"] = one_line(f"[panfm] {name}: {event.kind.value} {event.site or ''}".rstrip(), 150)
    message["From"], message["To"] = mail.sender, ", ".join(mail.to)
    message["Message-ID"] = f"<{number}.{event.run or name}@panfm.invalid>"
    message.set_content(f"{told(name, event)}\n\nrun: {event.run}\ntime: {event.time}\nevent: {number}\n")
    context = ssl.create_default_context(cafile=mail.root_certificates)
    connection = (
        smtplib.SMTP_SSL(mail.host, mail.port, timeout=TIMEOUT_S, context=context)
        if mail.tls == "tls"
        else smtplib.SMTP(mail.host, mail.port, timeout=TIMEOUT_S)
    )
    with connection as server:
        if mail.tls == "starttls":
            server.starttls(context=context)
        if mail.user is not None:
            server.login(mail.user, mail.password())
        server.send_message(message)
