"""`panfm site start`: runs the worker. It is in a file of its own, so that a worker holds no other command's code."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from panfm.config import SiteConfig

app = typer.Typer()


@app.command("start")
def site_start(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Run the site's worker until it is stopped: it answers handshakes and rounds at its socket, and nothing else.

    It answers for experiments that you have approved (panfm site approve), and reads site.toml anew for every question.
    """
    import logging

    from panfm.config import load_site

    config = load_site(site)
    from panfm.site.handler import limit_memory
    from panfm.site.worker import Worker, check_closed, listen

    if "PANFM_LOG" in os.environ:
        from panfm.json_log import begin_json_log

        begin_json_log()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    check_closed(site, config)
    limit_memory(config.limits.memory_gib)
    with listen(site, config) as listener:
        worker = Worker(site, listener)
        typer.echo(f"{config.name}: at work; its SuperNode, under Flower's account:")
        typer.echo(supernode_command(site, config))
        if config.limits.memory_gib is None:
            typer.echo("limits.memory-gib is not set: a run may fill all memory of this machine", err=True)
        worker.serve_forever()


def supernode_command(folder: Path, site: "SiteConfig") -> str:
    """The command that starts the site's SuperNode, ready for a shell."""
    from panfm.config import site_path

    coordinator = site.coordinator
    words = ["flower-supernode", "--superlink", coordinator.address]
    words += ["--root-certificates", str(site_path(folder, coordinator.root_certificates))]
    words += ["--auth-supernode-private-key", str(site_path(folder, coordinator.key))]
    return shlex.join(
        [*words, "--node-config", f"site-socket={json.dumps(str(site_path(folder, site.worker.socket)))}"]
    )
