"""Federations, claims and speed on one machine: `python -m simulations run|cohort|inputs|study|bench|...`."""

import ast
import itertools
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from simulations.engines.offline import go_offline

go_offline()

import typer  # noqa: E402

from panfm.cli.common import Version  # noqa: E402
from panfm.errors import ConfigError, PanfmError  # noqa: E402
from panfm.extras import needs_extra  # noqa: E402
from panfm.files import make_files_private  # noqa: E402
from simulations.simulate_command import simulate  # noqa: E402

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
cohort_app = typer.Typer(no_args_is_help=True, help="Data sets of simulated federations.")
app.add_typer(cohort_app, name="cohort")
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def main(_version: Version = False) -> None:
    """Federations, claims and speed on one machine."""
    make_files_private()


app.command("run")(simulate)


@cohort_app.command("make")
def cohort_make(
    folder: Annotated[Path, typer.Argument(help="New folder of the cohort.")],
    run: Annotated[Path, typer.Option("--run", help="Run description (TOML); its cohort table is written.")],
    preset: Annotated[
        str | None, typer.Option(help="Instead of the run's: transient, lasting, shortcut or textured.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the run's draw.")] = None,
    subjects: Annotated[int | None, typer.Option(min=1, help="Patients per site, instead of the run's.")] = None,
) -> None:
    """Write a run's cohort as site folders: phantoms as NIfTI or PNG files, real images by their paths.

    A run makes its own cohort under cohorts/; this is for looking at one, and for trying `panfm site` on its sites:

    python -m simulations cohort make phantoms --run configs/experiments/quickstart.toml --subjects 10
    """
    from rich.console import Console

    from simulations.cohorts.prepare import cohort_of, load_simulation, write_cohort

    flags = {"preset": preset, "seed": seed}
    words = [f"cohort.{key}={value}" for key, value in flags.items() if value is not None]
    description = load_simulation(run, words)
    if subjects and description.cohort:
        sites = {name: site | {"subjects": subjects} for name, site in description.cohort.get("sites", {}).items()}
        description = description.model_copy(update={"cohort": description.cohort | {"sites": sites}})
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    write_cohort(cohort_of(description, str(run)), folder, description.streams, console)
    typer.echo(f"{folder}: {len(list((folder / 'sites').iterdir()))} sites and held-out subjects")


@app.command()
def inputs(
    experiment: Annotated[Path, typer.Argument(help="Run description (TOML).")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.rounds=3.")] = None,
) -> None:
    """Print `input-centre` and `input-scale` of every stream, from the training images of a cohort's sites."""
    from rich.console import Console

    from simulations.cohorts.opened import OpenedCohort
    from simulations.cohorts.prepare import load_simulation, prepare_cohort

    described = load_simulation(experiment, overrides or ())
    cohort = OpenedCohort.open(prepare_cohort(described, Console(stderr=True)), described)
    for name, (centre, scale) in cohort.input_constants(described).items():
        typer.echo(f"{name}: input-centre = {centre}, input-scale = {scale}")


@app.command(context_settings=_PASS_ON)
def study(context: typer.Context, name: Annotated[str, typer.Argument(help="Name of the study.")]) -> None:
    """Try a paper's claim, side by side with its baselines."""
    _pass_on("study", "studies", name, context.args)


@app.command(context_settings=_PASS_ON)
def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="Name of the bench.")]) -> None:
    """Answer a speed or size question, both sides in one run."""
    _pass_on("bench", "bench", name, context.args)


@app.command()
def bench_check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of benches; all that are kept when left out.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Measure three times and keep the ratios instead.")] = False,
) -> None:
    """Compare the ratios of benches, at a reduced size, with those that are kept: none may be a fifth larger."""
    from rich.console import Console

    from simulations import bench_check as checked

    work = checked.keep if keep else checked.check
    work(checked.chosen(names or ()), Console(soft_wrap=True, highlight=False))


@app.command()
def same_bits(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Commit to compare this tree with.")],
    only: Annotated[list[str] | None, typer.Option(help="Name of a run; all when left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without the deployment of real processes.")] = False,
) -> None:
    """Prove that this tree gives, bit for bit, the models, states, rounds and replies of an earlier commit."""
    from rich.console import Console

    from simulations.same_bits.command import same_bits as prove
    from simulations.same_bits.runs import chosen

    prove(base, chosen(only or [], quick=quick), Console(soft_wrap=True, highlight=False))


def _pass_on(verb: str, package: str, name: str, words: list[str]) -> None:
    """Hand the rest of the command line to `main` of the file of a study or bench."""
    known = files_of(package)
    if name in ("--help", "-h"):
        typer.echo(f"python -m simulations {verb} NAME [--help]\n")
        typer.echo("\n".join(f"  {other:20} {_first_line(path)}" for other, path in known.items()))
        return
    if name not in known:
        raise ConfigError(f"{name}: unknown, expected one of {', '.join(known)}")
    _check_experiment(words)
    command = command_of(package, known[name])
    command(args=_with_json_path(words, f"{name}.json"), prog_name=f"python -m simulations {verb} {name}")


def files_of(package: str) -> dict[str, Path]:
    """Name of each file in the package `studies` or `bench` -> its path."""
    paths = (Path(__file__).parent / package).glob("[a-z]*.py")
    return dict(
        sorted((path.stem.removesuffix("_study").removesuffix("_bench").replace("_", "-"), path) for path in paths)
    )


def command_of(package: str, path: Path) -> typer.Typer:
    """The command of a study's or bench's file."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(import_module(f"simulations.{package}.{path.stem}").main)
    return command


def _check_experiment(words: list[str]) -> None:
    """Check the description that `--experiment` names, so that a mistake is told before torch is imported."""
    from panfm.privacy.guarantees import load_checked_run

    for word, following in itertools.zip_longest(words, words[1:]):
        option, equals, path = word.partition("=")
        if option == "--experiment" and (path := path if equals else following):
            load_checked_run(Path(path))


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _with_json_path(words: list[str], path: str) -> list[str]:
    """`--json` without a path writes `<name>.json` here."""
    if "--json" not in words:
        return words
    after = words.index("--json") + 1
    bare = after == len(words) or words[after].startswith("-")
    return [*words[:after], path, *words[after:]] if bare else words


if __name__ == "__main__":
    try:
        with needs_extra("simulation"):
            app()
    except PanfmError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)
