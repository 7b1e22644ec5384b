"""Damage of hostile sites to the others' model, by attack, mean and guards.

Five phantom hospitals with three or four of four organs, so that each organ is at three honest ones or more; the last
is hostile. The attacks (_hostile.py) act on its real messages to the real server.

    untrained                      what all start from
    honest                         nobody is hostile; the weighted mean, guards as they are by default
    <attack>/<mean>/<guards>       means: weighted, median, trimmed, geometric-median; guards: default, off
    10:honest, 10:<attack>/...     ten such hospitals, of which two are hostile
    dex:untrained, dex:honest      the five with a Director-Experts model and pooled experts, for
    gate-mass/<mean>/<guards>      which they stand

    val_loss     masked autoencoding of held-out patients by the federated model: a loss whose targets do not move
    auc          of its frozen features, over all labels and all held-out patients
    site_share   largest share of the weight of a group, or of a pooled expert, that a hostile site had in any round,
                 where three sites or more contributed

`damage/<arm>` is (val_loss - val_loss of honest) / (val_loss of untrained - val_loss of honest), each a mean over all
pairs: the share of what the federation gained that the attack costs. With the default mean and guards, one of five is
to cost a tenth at most, and no site is to have more than `federation.max-share`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig
from panfm.models import build_model
from panfm.training.trainer import Trainer
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.phantom import PhantomSiteConfig
from simulations.cohorts.prepare import cohort_of, load_simulation, with_cohort
from simulations.harness import TRANSIENT, ArmJob, CohortJob, StudyOptions, run_arms, study
from simulations.studies._cohorts import write_files
from simulations.studies._federations import Federated, federate
from simulations.studies._hostile import GUARDS_OFF, federate_with
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target
from strategies.weight_caps import FEWEST

MEANS = ("weighted", "median", "trimmed", "geometric-median")
GUARDS = ("default", "off")
ATTACKS = ("scaling", "sign-flip", "inflated", "little-is-enough")
DEFAULT = "weighted/default"
"""Mean and guards of a run that names none."""
_TEN, _DEX = "10:", "dex:"
_GATES = "gate-mass"
_ORGANS = ("brain", "heart", "adipose", "liver")
_SUBJECTS = (80, 100, 120, 100, 100)
_HOLDOUT = 200
_ROUNDS = {"short": 10, "medium": 25, "long": 60}
_EXPERTS = ("model.backbone=director-experts", "model.experts.count=4", "sharing.experts=pooled")


def arms() -> list[str]:
    """Every arm, in the order in which they are measured."""
    variants = [f"{mean}/{guards}" for mean in MEANS for guards in GUARDS]
    attacked = [f"{attack}/{variant}" for attack in ATTACKS for variant in variants]
    of_five = ["untrained", "honest", *attacked]
    of_ten = [f"{_TEN}honest", *(f"{_TEN}{arm}" for arm in attacked)]
    return [*of_five, f"{_DEX}untrained", f"{_DEX}honest", *(f"{_GATES}/{variant}" for variant in variants), *of_ten]


Only = Annotated[str, typer.Option("--arms", help="Only attacked arms that end so, e.g. weighted/default.")]


@study(seeds=3, budgets=_ROUNDS, unit="rounds")
def main(options: StudyOptions, budget: str, only: Only = "") -> StudyResult:
    """Damage of one hostile site of five and of two of ten, by attack, mean and guards."""
    chosen = arms_of(only)
    result = run(options, _ROUNDS[budget], chosen)
    show(result, chosen)
    return result


def arms_of(only: str) -> list[str]:
    """The arms without an attack, and those with one whose names end as asked. Raises typer.BadParameter for none."""
    if not any("/" in arm and arm.endswith(only) for arm in arms()):
        raise typer.BadParameter(f"{only}: ends no arm, expected e.g. {DEFAULT}", param_hint="--arms")
    return [arm for arm in arms() if "/" not in arm or arm.endswith(only)]


def run(options: StudyOptions, rounds: int, chosen: Sequence[str]) -> StudyResult:
    """Run the study with some of its arms."""
    base = study_run("honest", 0, 0, rounds)
    result = StudyResult("poisoning", {"pairs": options.pairs(), "run": base.model_dump(mode="json", by_alias=True)})
    for job, measured in run_arms(options, chosen, rounds, write_draw, measure):
        result.add(job.arm, measured)
    result.ratios |= {f"damage/{arm}": damage(result, arm) for arm in chosen if "/" in arm}
    result.targets += targets(result, chosen)
    return result


def num_sites_of(arm: str) -> int:
    """Number of sites of an arm; one of five and two of ten are hostile."""
    return 10 if arm.startswith(_TEN) else 5


def study_run(arm: str, draw: int, seed: int, rounds: int) -> RunConfig:
    """The run of one arm."""
    num_sites = num_sites_of(arm)
    changes = [f"seed={seed}", f"train.rounds={rounds}", "train.local-steps=8", "train.batch-size=16"]
    changes += ["probe.bootstrap=0", "objective={name='mae'}", "masking.policy=random"]
    if arm.startswith((_DEX, _GATES)):
        changes += _EXPERTS
    if "/" in arm:
        _, mean, guards = arm.split("/")
        changes += [f"sharing.mean={mean}", *(GUARDS_OFF if guards == "off" else ())]
    base = load_simulation(TRANSIENT, changes)
    cohort = cohort_of(base)
    sites = {
        f"site-{index + 1:02}": PhantomSiteConfig(
            organs=tuple(organ for place, organ in enumerate(_ORGANS) if place != index % 5),
            subjects=_SUBJECTS[index % 5],
        )
        for index in range(num_sites)
    }
    changed = {"seed": draw, "sites": sites, "holdout_subjects": _HOLDOUT}
    streams = {name: stream for name, stream in base.streams.items() if name.split("-")[0] in _ORGANS}
    run = with_cohort(base, cohort.model_copy(update=changed))
    return run.model_copy(update={"name": "poisoning", "streams": streams})


def write_draw(job: CohortJob) -> Path:
    """Write one draw of five sites and one of ten, each under its number of sites; returns their folder."""
    for arm in ("honest", f"{_TEN}honest"):
        run = study_run(arm, job.draw, 0, 1)
        write_files(cohort_of(run), job.folder / str(num_sites_of(arm)), run)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm and measure its model."""
    run = study_run(job.arm, job.draw, job.seed, job.length)
    folder = job.cohort / str(num_sites_of(job.arm))
    trained, cohort = _trained(job.arm, run, folder), OpenedCohort.open(folder, run)
    trainer, held_out = Trainer(run), cohort.holdout.store
    trainer.load_shared(trained.model.split_state(run.sharing)[0])
    return {
        "val_loss": trainer.validate(held_out, held_out.indices("test"), site="holdout").loss,
        "auc": cohort.auc(run, trained.model),
        "site_share": largest_share(trained, hostile_names(job.arm)),
    }


def _percent(damage: float | None) -> str:
    if damage is None:
        return ""
    return f"{damage:+.1%}" if damage <= 1.0 else "> 100%"


def _trained(arm: str, run: RunConfig, cohort: Path) -> Federated:
    if arm.endswith("untrained"):
        return Federated(build_model(run), [])
    if "/" not in arm:
        return federate(run, cohort)
    attack = arm.removeprefix(_TEN).split("/")[0]
    return federate_with(run, cohort, attack, len(hostile_names(arm)))


def hostile_names(arm: str) -> list[str]:
    """The hostile sites of an arm; those that would be, where nobody is."""
    num_sites = num_sites_of(arm)
    return [f"site-{number:02}" for number in range(num_sites - num_sites // 5 + 1, num_sites + 1)]


def largest_share(trained: Federated, sites: list[str]) -> float:
    """The largest share that one of the sites had of any group in any round; 0 if they were always refused."""
    return max((share for line in trained.rounds for share in _shares(line, sites)), default=0.0)


def _shares(line: Mapping[str, Any], sites: list[str]) -> Iterator[float]:
    """Shares of sites in one round, of groups that three sites or more trained."""
    shares = {site: told["shares"] for site, told in line["sites"].items()}
    num_trained = Counter(group for groups in shares.values() for group, share in groups.items() if share)
    for site in set(sites) & set(shares):
        yield from (share for group, share in shares[site].items() if num_trained[group] >= FEWEST)


def damage(result: StudyResult, arm: str) -> float:
    """Share of what the federation gained in validation loss that an attack costs."""
    start, honest = (result.mean("val_loss", reference) for reference in references(arm))
    return (result.mean("val_loss", arm) - honest) / (start - honest)


def references(arm: str) -> tuple[str, str]:
    """Name the untrained and the honest arm that an attacked arm is compared with."""
    prefix = _TEN if arm.startswith(_TEN) else _DEX if arm.startswith(_GATES) else ""
    return "untrained" if prefix == _TEN else f"{prefix}untrained", f"{prefix}honest"


def targets(result: StudyResult, chosen: Sequence[str]) -> list[Target]:
    """Targets of the default mean and guards against one hostile site of five, for the arms that were measured."""
    by_default = [arm for attack in (*ATTACKS, _GATES) if (arm := f"{attack}/{DEFAULT}") in chosen]
    damages = [Target(f"minus the damage of {arm}", -result.ratios[f"damage/{arm}"], -0.1) for arm in by_default]
    cap = study_run("honest", 0, 0, 1).federation.max_share
    shares = [max(result.values["site_share", arm]) for arm in chosen if arm.endswith("/default")]
    name = "cap minus the largest share of a hostile site under default guards"
    return [*damages, *([Target(name, cap - max(shares), 0.0)] if shares else [])]


def show(result: StudyResult, chosen: Sequence[str], console: Console | None = None) -> None:
    """Every arm, and the targets."""
    table = Table("arm", "val loss", "AUC", "share", "damage", title="poisoning: mean and sd over pairs")
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(map(len, arms()))
    for arm in chosen:
        lost = result.ratios[f"damage/{arm}"] if "/" in arm else None
        loss = mean_sd(result.values["val_loss", arm]) if lost is None or lost <= 1.0 else "diverged"
        share = f"{np.max(result.values['site_share', arm]):.3f}"
        table.add_row(arm, loss, f"{result.mean('auc', arm):.3f}", share, _percent(lost))
    print_study(result, table, console=console, with_ratios=False)
