"""`panfm simulate`, which is `python -m simulations run`: a federation on one machine."""

from pathlib import Path
from typing import Annotated

import typer

from panfm.errors import ConfigError
from panfm.extras import needs_extra

app = typer.Typer(no_args_is_help=True)


@app.command()
def simulate(
    experiment: Annotated[
        Path | None, typer.Argument(help="Run description (TOML); may be left out with --resume.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.rounds=3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>-<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    extend: Annotated[
        str | None, typer.Option(help="With --resume, of a run that has finished: more rounds, e.g. rounds=40.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, ray, flower or deployment.")] = "local",
) -> None:
    """Run a federation, probe its model, write a report.

    What the run will read and write is checked before its first round, and what it leaves out is told by name. A run
    goes on as it was described: with --resume, a description that was edited is refused.
    """
    from simulations.engines.offline import go_offline

    go_offline()
    with needs_extra("simulation"):
        _simulate(experiment, overrides or [], out, resume, extend, engine)


def _simulate(
    experiment: Path | None,
    overrides: list[str],
    out: Path | None,
    resume: Path | None,
    extend: str | None,
    engine: str,
) -> None:
    from simulations.cohorts.prepare import load_simulation, public_weights
    from simulations.engines.job import ENGINES

    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    rounds = None if extend is None else _more_rounds(extend, resume)
    # A mistake is told before torch is imported, which takes seconds.
    if not resume:
        if experiment is None:
            raise ConfigError("expected a run description (TOML), or --resume with a run folder")
        load_simulation(experiment, overrides, weights=public_weights())
    elif not overrides and not out:  # else `simulate` refuses the words, whatever the run folder holds
        load_simulation(resume / "run.toml")
    from simulations.simulate import simulate

    simulate(experiment, overrides, out=out, resume=resume, rounds=rounds, engine=engine)


def _more_rounds(extend: str, resume: Path | None) -> int:
    if resume is None:
        raise ConfigError("--extend: goes with --resume RUN, expected the run folder to go on with")
    key, _, number = extend.partition("=")
    if key.removeprefix("train.") != "rounds" or not number.isdecimal():
        raise ConfigError(f"--extend {extend!r:.80}: expected rounds=N, the rounds of the whole run")
    return int(number)
