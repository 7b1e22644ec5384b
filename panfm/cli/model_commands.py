"""`panfm embed|whiten|probe|report|export`: commands for a run and its model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.common import Model, check_model, open_stores, progress_bar
from panfm.errors import ConfigError

if TYPE_CHECKING:
    from panfm.evaluate.result import Score

app = typer.Typer(no_args_is_help=True)


@app.command()
def embed(
    model: Model,
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    out: Annotated[Path, typer.Option(help="Feature file to write (.npz).")],
    pooling: Annotated[
        str | None,
        typer.Option(help="Instead of the run's, unwhitened: e.g. cls, per-stream, layers, layers:8,10,12."),
    ] = None,
) -> None:
    """Write the frozen features of a site's subjects."""
    check_model(model)
    from panfm.config.features import parse_pooling

    features = None if pooling is None else parse_pooling(pooling)
    from panfm.evaluate.embed import embed_site, load_model, write_features

    network, run = load_model(model, features)
    [store] = open_stores([site], run.streams)
    done = 0
    with progress_bar("embedding subjects") as progress:

        def on_batch(size: int) -> None:
            nonlocal done
            done += size
            progress(done, len(store.subjects))

        table = embed_site(model, network, store, on_batch)
    write_features(out, table)
    subjects, sessions = len(set(table.subjects)), f" in {len(table.sessions)} sessions" if table.sessions else ""
    typer.echo(f"{out}: {subjects} subjects{sessions}, {table.features.shape[1]} features")


@app.command()
def whiten(
    model: Model,
    sites: Annotated[list[Path], typer.Argument(help="Site folders, whose training images it is fitted from.")],
) -> None:
    """Fit the within-image whitening of a model's embeddings from sites on this machine, and keep it beside the model.

    `embed` and `export` use it from then on; sums of several sites are added. It tells of the training images as a
    covariance does, so a model with a privacy claim gets none.
    """
    check_model(model)
    from panfm.config import load_run, load_site
    from panfm.privacy.guarantees import privacy_label

    if (label := privacy_label(load_run(model / "run.toml"))) != "none":
        raise ConfigError(f"{model}: a whitening is fitted without noise, expected a model without a claim ({label})")
    from panfm.evaluate.embed import load_model
    from panfm.evaluate.fit_whitening import fit_whitening
    from panfm.models.whitening import save_whitening

    network, run = load_model(model, whitened=False)
    names = [load_site(site).name for site in sites]
    stores = dict(zip(names, open_stores(sites, run.streams, split="train"), strict=True))
    whitening = fit_whitening(network, stores, run.features, run.seed)
    digest = save_whitening(model, whitening, run.features.pooling_text)
    typer.echo(f"{model}: whitening of {network.embedding_size} numbers, SHA-256 {digest}")


@app.command()
def probe(
    features: Annotated[list[Path], typer.Argument(help="Feature files written by `panfm embed`.")],
    labels: Annotated[list[Path], typer.Option(help="Label table; may be given again, e.g. one per site.")],
    fit_split: Annotated[str, typer.Option(help="Split to fit on.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of the test subjects.")] = 1000,
) -> None:
    """Fit a linear probe of each label on frozen features: AUC, or R2 of a number, with 95 % interval."""
    from panfm.data.labels import read_label_table
    from panfm.evaluate.embed import read_features
    from panfm.evaluate.probe_features import probe_features

    tables = [read_label_table(path) for path in labels]
    scores, notes = probe_features(
        [read_features(path) for path in features],
        tables,
        fit_split=fit_split,
        test_split=test_split,
        bootstrap=bootstrap,
    )
    _print_scores(scores)
    for note in notes:
        typer.echo(note)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to: Annotated[str, typer.Option(help="safetensors, dense-vit, timm, huggingface, monai-bundle or onnx.")],
    out: Annotated[Path, typer.Option(help="New folder; for onnx, new file.")],
    streams: Annotated[
        str,
        typer.Option(
            help="For monai-bundle and onnx: the inputs, e.g. brain-mr,heart-ct; all when left out. For timm, and "
            "huggingface in the form of transformers: one stream of pictures."
        ),
    ] = "",
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, for the metadata.")] = None,
) -> None:
    """Write a run's model for use elsewhere, read it back, and compare it with the original.

    safetensors: the weights as they are, read by `panfm embed`. dense-vit: a plain ViT of this library; a
    Director-Experts model goes through its directors. monai-bundle: a folder for MONAI. onnx: one file, one input per
    stream and `present`, needs the extra `onnx` of panfm. timm: one stream's encoder under the names of timm's ViT.
    huggingface: the whole model with a model card, read by `panfm.load`; of one stream as transformers' DINOv2. Each
    says streams, spacing, intensity rules, sites, rounds, epsilon, licence and intended use.
    """
    if (run_folder / "model").is_dir():
        check_model(run_folder / "model")
    from panfm.export.formats import export_run

    names = [name.strip() for name in streams.split(",") if name.strip()]
    difference = export_run(run_folder, to, out, streams=names, licence=licence)
    typer.echo(f"{out}: read back, embeds as the run's model does (largest difference {difference:.1g})")


def _print_scores(scores: Sequence["Score"]) -> None:
    from rich.console import Console
    from rich.table import Table

    from panfm.report.console_tables import score_text

    table = Table("label", "metric", "value [95 % interval]")
    for score in scores:
        table.add_row(score.group, score.metric, score_text(score))
    Console().print(table)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="Run folder; the run may still be going on.")]) -> None:
    """Print a run's tables and write report.html into its folder."""
    from panfm.report.run_files import read_run

    run = read_run(run_folder)
    from rich.console import Console

    from panfm.report.console_tables import print_tables
    from panfm.report.report_page import write_report

    print_tables(run, Console())
    typer.echo(f"report: {write_report(run)}")
