"""`panfm embed|whiten|probe|report|export`: commands for a run and its model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.command_parts import check_output, progress_bar
from panfm.cli.model_arguments import Model, check_model, open_stores
from panfm.errors import ConfigError, DataError
from panfm.evaluate.model_folder import model_folder

if TYPE_CHECKING:
    from panfm.config import RunConfig
    from panfm.data.store import ImageStore
    from panfm.evaluate.embed import Features
    from panfm.evaluate.result import Score

app = typer.Typer(no_args_is_help=True)
_METHODS = ("linear", "knn", "attentive")
"""Methods of `panfm probe`, by name; panfm/evaluate/probe_methods.py has their functions."""


@app.command()
def embed(
    model: Model,
    sources: Annotated[list[Path], typer.Argument(metavar="SITE|FILE...", help="A site folder, or image files.")],
    out: Annotated[Path, typer.Option(help="Feature file to write (.npz).")],
    pooling: Annotated[
        str | None,
        typer.Option(help="Instead of the run's, unwhitened: e.g. cls, per-stream, layers, layers:8,10,12."),
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Of image files; may be left out where the model has one stream.")
    ] = None,
) -> None:
    """Write the frozen features of a site's subjects, or of image files: each file is a subject of its own."""
    check_output(out)
    check_model(model)
    from panfm.evaluate.pooling_option import parse_pooling

    features = None if pooling is None else parse_pooling(pooling)
    from panfm.data.joins import counted
    from panfm.evaluate.embed import embed_site, load_model, write_features

    network, run = load_model(model, features)
    store = _opened(sources, run, stream)
    done = 0
    with progress_bar("embedding subjects") as progress:

        def on_batch(size: int) -> None:
            nonlocal done
            done += size
            progress(done, len(store.subjects))

        table = embed_site(model, network, store, on_batch)
    write_features(out, table)
    subjects = counted(len(set(table.subjects)), "subject")
    sessions = f" in {len(table.sessions)} sessions" if table.sessions else ""
    typer.echo(f"{out}: {subjects}{sessions}, {table.features.shape[1]} features")


def _opened(sources: Sequence[Path], run: "RunConfig", stream: str | None) -> "ImageStore":
    """The images of one site folder, or of some files of one stream."""
    is_site = [(source / "site.toml").is_file() for source in sources]
    if is_site == [True]:
        return open_stores(sources, run.streams)[0]
    if any(is_site):
        raise ConfigError(f"{sources[is_site.index(True)]}: a site beside others, expected one site, or image files")
    stream = stream or (next(iter(run.streams)) if len(run.streams) == 1 else None)
    if stream not in run.streams:
        given = "nothing" if stream is None else repr(stream)
        raise ConfigError(f"--stream: found {given}, expected one of {', '.join(run.streams)}")
    from panfm.data.image_files import store_of_files

    with progress_bar("reading images") as progress:
        return store_of_files(sources, stream, run.streams[stream], progress)


@app.command()
def whiten(
    model: Model,
    sites: Annotated[list[Path], typer.Argument(help="Site folders, whose training images it is fitted from.")],
) -> None:
    """Fit the within-image whitening of a model's embeddings from sites on this machine, and keep it beside the model.

    `embed` and `export` use it from then on; sums of several sites are added. It tells of the training images as a
    covariance does, so a model with a privacy claim gets none.
    """
    check_output(model / "metadata.json")
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
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FEATURES... | RUN SITE...", help="Feature files, or a run and site folders to embed."),
    ],
    labels: Annotated[
        list[Path] | None,
        typer.Option(help="Label table; may be given again, e.g. one per site. Sites bring their own."),
    ] = None,
    fit_split: Annotated[str, typer.Option(help="Split to fit on.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of the test subjects.")] = 1000,
    method: Annotated[
        str,
        typer.Option(help="linear, knn (nearest neighbours), or attentive (attention over a run's tokens)."),
    ] = "linear",
    few_labels: Annotated[
        bool, typer.Option("--few-labels", help="Fit on 1, 5, 10, 50 and 100 % of the labels too, five draws of each.")
    ] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Feature file, or run, of another model for the same subjects: adds paired differences."),
    ] = None,
) -> None:
    """Fit a probe of each label on frozen features: AUC, or R2 of a number, with 95 % intervals over subjects.

    Whether a label is yes or no, one of several classes, or a number is told by its values; a file labels.toml beside
    the table can say otherwise. Of yes or no the calibration is measured as well, of few whole numbers (grades) the
    weighted kappa. Without a labelled subject in the test split the others are cross-validated in five folds.
    """
    from panfm.data.label_kinds import encode, infer_kinds, read_rules
    from panfm.data.labels import read_cells
    from panfm.evaluate.embed import read_features

    is_run = sources[0].is_dir()
    if method not in _METHODS:
        raise ConfigError(f"--method: found {method!r:.80}, expected {', '.join(_METHODS)}")
    if method == "attentive" and not all(path.is_dir() for path in [*sources[:1], *(against or [])]):
        raise ConfigError("--method attentive: found feature files, expected runs and sites, since it reads tokens")
    if not is_run and (runs := [path for path in against or [] if path.is_dir()]):
        raise ConfigError(f"--against {runs[0]}: found a run, expected feature files as {sources[0]}")
    tables = [read_cells(path) for path in labels or (_tables_of(sources[1:]) if is_run else ())]
    if not tables:
        raise ConfigError("--labels: missing, expected a label table, or sites whose site.toml names one")
    kinds = infer_kinds(tables, read_rules(tables))
    for note in kinds.notes:
        typer.echo(note)
    if all(kind.kind == "ignore" for kind in kinds.by_column.values()):
        raise DataError(f"{tables[0].path}: no label to probe, expected a column whose values vary")
    from panfm.evaluate.probe_features import probe_features
    from panfm.evaluate.probe_methods import METHODS

    def features_of(paths: Sequence[Path]) -> list["Features"]:
        if paths and paths[0].is_dir():
            return _embedded(model_folder(paths[0]), sources[1:], tokens=method == "attentive")
        return [read_features(path) for path in paths]

    scores, notes = probe_features(
        features_of(sources),
        [encode(table, kinds.by_column) for table in tables],
        fit_split=fit_split,
        test_split=test_split,
        bootstrap=bootstrap,
        method=METHODS[method],
        few_labels=few_labels,
        against=features_of(against or ()),
    )
    _print_scores(scores)
    for note in notes:
        typer.echo(note)


def _tables_of(sites: Sequence[Path]) -> list[Path]:
    """The label tables that sites name."""
    from panfm.config import load_site, site_path

    named = [(site, load_site(site).labels) for site in sites]
    return [site_path(site, labels) for site, labels in named if labels is not None]


def _embedded(model: Path, sites: Sequence[Path], *, tokens: bool) -> list["Features"]:
    """Features, or all tokens, of the subjects of some sites."""
    check_model(model)
    from panfm.evaluate.attentive_probe import TokenReader
    from panfm.evaluate.embed import embed_site, load_model

    network, run = load_model(model)
    reader = TokenReader(network) if tokens else None
    return [embed_site(model, network, store, reader=reader) for store in open_stores(sites, run.streams)]


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of its model.")],
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
    if (model_folder(run_folder) / "run.toml").exists():
        check_model(model_folder(run_folder))
    from panfm.export.formats import export_run

    names = [name.strip() for name in streams.split(",") if name.strip()]
    difference = export_run(run_folder, to, out, streams=names, licence=licence)
    typer.echo(f"{out}: read back, embeds as the run's model does (largest difference {difference:.1g})")


def _print_scores(scores: Sequence["Score"]) -> None:
    from rich.console import Console
    from rich.table import Table

    from panfm.report.console_tables import score_text

    arms = {score.arm for score in scores}
    table = Table(*(["features"] if len(arms) > 1 else []), "label", "metric", "value [95 % interval]")
    for score in scores:
        table.add_row(*([score.arm] if len(arms) > 1 else []), score.group, score.metric, score_text(score))
    Console(markup=False).print(table)


@app.command()
def report(
    run_folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders; a run may still be going on.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write; by default report.html in the run folder, or comparison.html here."),
    ] = None,
) -> None:
    """Print a run's tables and write its page, report.html; of several runs, one page that compares them."""
    from panfm.report.run_files import read_run

    page = out or (run_folders[0] / "report.html" if len(run_folders) == 1 else Path("comparison.html"))
    check_output(page)
    runs = [read_run(folder) for folder in run_folders]
    from rich.console import Console

    from panfm.report.console_tables import print_tables
    from panfm.report.report_page import write_comparison, write_report

    for run in runs:
        print_tables(run, Console(markup=False))
    try:
        path = write_report(runs[0], page) if len(runs) == 1 else write_comparison(runs, page)
    except OSError as error:
        raise DataError(f"{page}: cannot be written ({error.strerror})") from error
    typer.echo(f"report: {path}")
