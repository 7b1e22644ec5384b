"""`python -m server kit|register|revoke|hospitals`: hospitals that join, change their key and leave."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
_Hospital = Annotated[str, typer.Argument(help="Name of the hospital, as in its site.toml.")]
_Connection = Annotated[str, typer.Option(help="SuperLink connection in $FLWR_HOME/config.toml.")]


@app.command()
def kit(
    hospital: _Hospital,
    server: Annotated[str, typer.Option(help="DNS name of the coordinator's machine, as in its certificate.")],
    out: Annotated[Path | None, typer.Option(help="New archive; HOSPITAL.tar.gz in this folder when left out.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the coordinator's proxy.")] = 443,
    ca: Annotated[
        Path, typer.Option(help="Certificate authorities to trust; several in one file while one is replaced.")
    ] = Path("/etc/panfm/ca.crt"),
    wheels: Annotated[
        Path | None, typer.Option(help="Folder of all wheels; they travel in the kit, for a hospital without an index.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Let install.py ask for an NVIDIA GPU.")] = False,
    disk_gib: Annotated[
        int, typer.Option(min=1, max=100_000, help="Free space that install.py asks for, in GiB.")
    ] = 20,
) -> None:
    """Make one file to send to a hospital: packages with hashes, units, ca.crt, site.toml, installer. No secret.

    It is made of the committed files of this clone. HOSPITAL.tar.gz.README.txt is sent with it: the commands of the
    hospital.
    """
    from server.flower_cli import ROOT
    from server.kit import KitOptions, write_kit

    options = KitOptions(hospital, server, port, ca, wheels, gpu, disk_gib)
    path = out or Path(f"{hospital}.tar.gz")
    digest = write_kit(options, ROOT, path)
    typer.echo(f"send:    {path}\nand:     {path}.README.txt\nSHA-256: {digest}")
    typer.echo(f"{hospital} reads the SHA-256 out to you, and then the fingerprint of its key, by telephone.")


@app.command()
def register(
    hospital: _Hospital,
    public_key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Public key that the hospital has sent.")],
    fingerprint: Annotated[
        str, typer.Option(metavar="WORDS", help="What the hospital has read out: 16 groups of 4, or SHA256:...")
    ],
    connection: _Connection = "deployment",
    renew: Annotated[bool, typer.Option("--renew", help="Shut the hospital's earlier key out.")] = False,
) -> None:
    """Let a hospital's SuperNode in, if its key has the fingerprint that was read out. Can be given again if killed."""
    from server.flower_cli import flower_environment
    from server.hospitals import Hospitals

    record = Hospitals(flower_environment(), connection)
    entry = record.register(hospital, public_key, fingerprint, renew=renew)
    ends = f"; the certificate authority ends {entry.certificate_ends[:10]}" if entry.certificate_ends else ""
    typer.echo(f"{hospital}: let in as node {entry.node_id}, written to {record.path}{ends}")


@app.command()
def revoke(hospital: _Hospital, connection: _Connection = "deployment") -> None:
    """Shut a hospital's SuperNode out for good. Its entry stays in the record, with the time."""
    from server.flower_cli import flower_environment
    from server.hospitals import Hospitals

    entry = Hospitals(flower_environment(), connection).revoke(hospital)[-1]
    typer.echo(f"{hospital}: shut out since {entry.revoked}, was node {entry.node_id or '(never let in)'}")


@app.command()
def hospitals(connection: _Connection = "deployment") -> None:
    """List all registrations: hospital, whether its SuperNode is online, node, since when, fingerprint."""
    from server.flower_cli import flower_environment
    from server.hospitals import Hospitals, spelled

    record = Hospitals(flower_environment(), connection)
    entries, statuses = record.entries(), record.statuses()
    for entry in entries:
        state = (
            f"revoked {entry.revoked}" if entry.revoked else statuses.get(entry.node_id, "unfinished: register again")
        )
        typer.echo(f"{entry.hospital}  {state}  node {entry.node_id or '-'}  since {entry.registered or '-'}")
        typer.echo(f"    {spelled(entry.fingerprint)}")
    typer.echo(f"{len(entries)} registrations in {record.path}")
