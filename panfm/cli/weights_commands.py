"""`panfm weights show|fetch`: public ViT weights to start from."""

from pathlib import Path
from typing import Annotated

import typer

from panfm.errors import DataError
from panfm.extras import needs_extra

app = typer.Typer(no_args_is_help=True, help="Public ViT weights to start from.")
_FILES = ["config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"]


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Weights file, or folder of Hugging Face with config.json.")],
) -> None:
    """Print family, shape and SHA-256 of public weights, and the lines of a run description that fit them."""
    from panfm.models.public_start import toml_value
    from panfm.models.public_weights import read_public

    public = read_public(path)
    fields = public.model_fields()
    channels, patch = public.kernel.shape[1], list(public.kernel.shape[2:])
    side = 0 if public.positions is None else int(len(public.positions) ** 0.5)
    grid = f"learned on {side} x {side} patches" if side else "rotary"
    typer.echo(f"# {public.family}: {public.width} wide, {public.depth} blocks, {channels} channels, positions {grid}")
    typer.echo(f"# sha256 {public.sha256}")
    typer.echo("[model]")
    for key, value in fields.items():
        typer.echo(f"{key} = {toml_value(value)}")
    typer.echo("[streams.<name>]  # another patch is possible: the kernel is then resized")
    typer.echo(f"patch = {patch}\nchannels = {channels}  # or 1")
    typer.echo('[train]\nparts = { kind = "last-blocks", blocks = 2 }  # or another part, or "all"')
    typer.echo(f'[start]\nmodel = "{path}"')
    if public.normalisation is None:
        typer.echo('normalisation = "imagenet"  # or "half" or "none": these weights do not tell')


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub, e.g. facebook/dinov2-small.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download public weights and their config.json, and show them. Needs a network and the extra `weights`."""
    if out.exists():
        raise DataError(f"{out}: exists, expected a new folder")
    with needs_extra("weights"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, revision=revision, local_dir=out, allow_patterns=_FILES)
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"{name}: huggingface.co cannot be reached; copy {', '.join(_FILES[:3])} into a folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise DataError(f"{name}: {str(error).splitlines()[0]:.160}") from error
    show(out)
