"""`panfm cohort ...`: phantom data sets of simulated federations."""

from pathlib import Path
from typing import Annotated

import typer

from panfm.cli.console import progress_bar
from panfm.errors import DataError

app = typer.Typer(no_args_is_help=True, help="Data sets of simulated federations.")


@app.command("make")
def cohort_make(
    folder: Annotated[Path, typer.Argument(help="New folder of the cohort.")],
    run: Annotated[Path, typer.Option("--run", help="Description of a run with a phantom cohort (TOML).")],
    preset: Annotated[str | None, typer.Option(help="Instead of the run's: transient or lasting.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the run's draw.")] = None,
    subjects: Annotated[int | None, typer.Option(min=1, help="Patients per site, instead of the run's.")] = None,
) -> None:
    """Write a phantom cohort as site folders of NIfTI or PNG files."""
    from panfm.config import load_run
    from panfm.config.cohort import ModalitiesCohortConfig, PhantomCohortConfig

    flags = {"preset": preset, "seed": seed}
    description = load_run(run, [f"cohort.{key}={value}" for key, value in flags.items() if value is not None])
    from panfm.data.modalities import write_modalities
    from panfm.data.phantom import write_cohort

    cohort = description.cohort
    if not isinstance(cohort, PhantomCohortConfig | ModalitiesCohortConfig):
        raise DataError(f'{run}: found no phantom cohort, expected cohort.kind = "phantom" or "modalities"')
    if subjects:
        sites = {name: site.model_copy(update={"subjects": subjects}) for name, site in cohort.sites.items()}
        cohort = cohort.model_copy(update={"sites": sites})
    with progress_bar("writing images") as progress:
        if isinstance(cohort, PhantomCohortConfig):
            write_cohort(folder, cohort, description.streams, progress)
        else:
            write_modalities(folder, cohort, description.streams, progress)
    typer.echo(f"{folder}: {len(cohort.sites)} sites and held-out subjects")
