"""The runs that two versions of the code are compared by: one small description, and what each run changes in it."""

from dataclasses import dataclass

from panfm.errors import ConfigError
from simulations.same_bits.comparison import PARTS

DESCRIPTION = """
name = "same-bits"
seed = 5

[cohort]
kind = "phantom"
seed = 1
holdout-subjects = 24

[cohort.sites]
alpha = { organs = ["brain", "heart"], subjects = 24 }
beta = { organs = ["heart", "liver"], subjects = 24 }
gamma = { organs = ["brain", "heart", "liver"], subjects = 24, age-shift = 0.5 }

[streams]
brain-mr = { spacing-mm = [10.0, 10.0, 10.0], shape = [16, 16, 16], patch = [8, 8, 16] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [16, 16, 16], patch = [8, 8, 16] }
liver-mr = { spacing-mm = [15.0, 15.0, 15.0], shape = [16, 16, 16], patch = [8, 8, 16] }

[train]
rounds = 2
local-steps = 5
batch-size = 8

[masking]
policy = "random"
warmup-steps = 2
settle-steps = 3

[federation]
min-sites = 3

[probe]
bootstrap = 20
missing-draws = 1
"""
"""Large enough for the default limits of a site: batches of 8, five local steps."""
STOP_ROUND = 2


@dataclass(frozen=True)
class Run:
    """One compared run."""

    name: str
    overrides: tuple[str, ...]
    """`key=value` of `--set`."""
    engine: str = "local"
    makes_cohort: bool = False
    """Makes the cohort from its description, and is probed; the other runs take the cohort's sites."""
    is_seeded: bool = False
    """Noise of a private run comes from a seed, else no two runs are alike."""
    resumes_like: str = ""
    """Stop the run in round 2, resume it, and compare it with this run as well, which was not stopped."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The `PARTS` that it leaves."""
        return PARTS if self.makes_cohort else tuple(part for part in PARTS if part != "probe")


FIRST = Run("latent-random", (), makes_cohort=True)
_DEX = ('model.backbone="director-experts"', "model.experts.count=4", "model.experts.active=2")
_INT8 = (
    'masking.policy="sgm"',
    'sharing.coding="int8"',
    'sharing.optimiser.kind="momentum"',
    'train.teacher-start="server-ema"',
    "train.proximal-mu=0.01",
)
RUNS = (
    FIRST,
    Run("latent-sgm", ('masking.policy="sgm"',)),
    Run("latent-organ-patch", ('masking.policy="organ"', 'model.tokenizer="patch"', 'sharing.head="private"')),
    Run(
        "dino-inverse",
        ('objective.name="dino"', 'masking.policy="inverse"', 'masking.scope="federation"', 'sharing.coding="bf16"'),
    ),
    Run(
        "mae-static",
        (
            'objective.name="mae"',
            'masking.policy="static"',
            'masking.static-organs=["heart"]',
            'sharing.optimiser.kind="adam"',
        ),
    ),
    Run(
        "robust-means",
        (
            'masking.policy="sgm"',
            'masking.scope="subject"',
            'sharing.mean="trimmed"',
            'sharing.groups.stream.mean="l-dawa"',
            'sharing.groups.head.mean="geometric-median"',
            "federation.min-sites=2",
            "federation.participation=0.7",
        ),
    ),
    Run("dex-private", (*_DEX, 'masking.policy="sgm"', 'masking.saliency="attention"')),
    Run("dex-pooled", (*_DEX, 'objective.name="dino"', 'sharing.experts="pooled"')),
    Run("dex-warm", (*_DEX, 'masking.policy="inverse"', f'start.model="runs/{FIRST.name}/model"')),
    Run("int8", _INT8),
    Run("int8-resumed", _INT8, resumes_like="int8"),
    Run(
        "private",
        (
            'masking.policy="sgm"',
            'masking.saliency="attention"',
            "objective.standardise=false",
            "patient-dp.epsilon=8.0",
            "patient-dp.delta=1e-3",
            "patient-dp.public-subjects=24",
            "patient-dp.noise-multiplier=1.6",
            "patient-dp.sample-rate=0.5",
        ),
        is_seeded=True,
    ),
    Run(
        "private-sites",
        (
            "site-dp.epsilon=8.0",
            "site-dp.delta=1e-3",
            "site-dp.num-sites=3",
            "site-dp.noise-multiplier=4.0",
        ),
        is_seeded=True,
    ),
    Run("deployment", ('masking.policy="sgm"',), engine="deployment"),
)


def chosen(names: list[str], *, quick: bool) -> list[Run]:
    """The first run, which makes the cohort, and the others that are named; all of them if none is.

    Args:
        quick: Leave the deployment out, unless it is named.

    Raises:
        ConfigError: there is no run of such a name.
    """
    known = {run.name for run in RUNS}
    if unknown := sorted(set(names) - known):
        raise ConfigError(f"--only {unknown[0]}: expected one of {', '.join(run.name for run in RUNS)}")
    wanted = set(names) or {run.name for run in RUNS if not (quick and run.engine == "deployment")}
    wanted |= {run.resumes_like for run in RUNS if run.name in wanted}
    return [run for run in RUNS if run is FIRST or run.name in wanted]
