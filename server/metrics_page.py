"""Serves the metrics of a run over HTTP, for a Prometheus that scrapes them: `/metrics`, and nothing else."""

import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any

from panfm.errors import ConfigError, PanfmError, RunError, one_line, reason
from panfm.report.run_files import read_run
from server.metrics import metrics_text

logger = logging.getLogger(__name__)
_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMEOUT_S = 10.0


class MetricsServer(ThreadingHTTPServer):
    """Listens at one address; the run folder is read anew for every request."""

    daemon_threads = True

    def __init__(self, run_dir: Path, listen: str) -> None:
        """Begin to listen.

        Args:
            listen: HOST:PORT, or [HOST]:PORT of IPv6; port 0 is any that is free.
        Raises:
            ConfigError: it is no such text.
            RunError: nobody can listen there.
        """
        host, _, port = listen.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or not (port.isascii() and port.isdigit() and int(port) < 65536) or (":" in bare) == (bare == host):
            raise ConfigError(f"--listen {listen!r:.80}: expected HOST:PORT, e.g. 127.0.0.1:9109")
        self.run_dir = run_dir
        self.address_family = AF_INET6 if ":" in bare else AF_INET
        try:
            super().__init__((bare, int(port)), _Handler)
        except OSError as error:
            raise RunError(f"--listen {listen}: nobody can listen there ({reason(error)})") from error


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version, sys_version = "panfm", ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Answer with the metrics of the run as it is."""
        if self.path != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            text = metrics_text(read_run(self.server.run_dir))
        except (PanfmError, OSError) as error:
            logger.warning("%s", one_line(str(error)))
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain="the run folder cannot be read")
            return
        content = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""
