"""The description of one run: streams, model, objective, masking, training, sharing.

One TOML file of this shape describes a run (`configs/experiments/*.toml`). The server resolves it once and sends the
resolved text to the sites, so every part of a federation reads the same words.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import BeforeValidator, Field, model_validator

from panfm.anatomy import DEFAULT_ORGANS, parse_stream
from panfm.config._base import BelowOne, ClipNorm, Config, Fraction, Name, Positive, Seed, Timeout, Uncoupled, Weight
from panfm.config.cohort import CohortConfig, StreamCohortConfig
from panfm.config.privacy import PrivacyConfig, broken_guarantees
from panfm.config.server_privacy import ServerPrivacyConfig, server_faults
from panfm.config.sharing import SharingConfig
from panfm.config.start import StartConfig

Voxels = Annotated[int, Field(gt=0, le=65_536)]
Millimetres = Annotated[float, Field(ge=1e-3, le=1e3)]


class StreamConfig(Uncoupled):
    """How the images of one stream are brought to one size and cut into tokens."""

    shape: Annotated[tuple[Voxels, ...], Field(strict=False, min_length=2, max_length=3)]
    """Voxels after resampling and crop/pad: [R, A, S] for a volume, [height, width] for an image."""
    patch: Annotated[tuple[Voxels, ...], Field(strict=False, min_length=2, max_length=3)]
    """Voxels of one token, one number per axis; divides `shape`."""
    spacing_mm: Annotated[tuple[Millimetres, ...], Field(strict=False, max_length=3)] = ()
    """Voxel size in mm on each axis of a volume; left out for 2D images, which are resized to `shape`."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour (2D only)."""

    @model_validator(mode="after")
    def _axes_agree(self) -> Self:
        if len(self.patch) != len(self.shape):
            raise ValueError(f"patch has {len(self.patch)} axes, shape has {len(self.shape)}")
        for size, step in zip(self.shape, self.patch, strict=True):
            if size % step:
                raise ValueError(f"patch {list(self.patch)} does not divide shape {list(self.shape)}")
        if self.is_volume and len(self.spacing_mm) != 3:
            raise ValueError("spacing-mm: a volume needs three numbers, in mm")
        if self.is_volume and self.channels != 1:
            raise ValueError("channels: a volume has one channel")
        if not self.is_volume and self.spacing_mm:
            raise ValueError("spacing-mm: only for volumes")
        return self

    @property
    def is_volume(self) -> bool:
        """Three axes, in mm."""
        return len(self.shape) == 3

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis."""
        return tuple(size // step for size, step in zip(self.shape, self.patch, strict=True))


Temperature = Annotated[float, Field(ge=1e-3, le=100.0)]


def _one_for_all_blocks(number: Any) -> Any:
    return (number,) if isinstance(number, int) else number


PerBlock = Annotated[
    tuple[Annotated[int, Field(gt=0, le=1024)], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_for_all_blocks),
]
"""One number for all blocks, or a list with one for each."""


class ExpertsConfig(Config):
    """Director-Experts (DEX, arXiv 2605.21861). Pairs are values at the start and the end of the run, by cosine."""

    count: PerBlock = (8,)
    """Experts in a block."""
    active: PerBlock = (2,)
    """Experts that a patient uses; all tokens of a patient use the same."""
    temperature: Temperature = 0.5
    """Of the router's softmax."""
    noise: Annotated[tuple[Weight, Weight], Field(strict=False)] = (1.0, 0.0)
    """Scale of the exploration noise on the router's logits."""
    director_momentum: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.99, 0.999)
    """EMA momentum of the director, which follows the experts by their gate mass."""
    alignment: Literal["cosine", "softmax"] = "cosine"
    """How the experts are pulled to the director: `cosine` as in the paper, `softmax` (cross-entropy over features) as
    in the released code."""
    alignment_weight: Weight = 0.01
    balance_weight: Annotated[tuple[Weight, Weight], Field(strict=False)] = (0.001, 0.0)
    """Weight of the pull to equal use of the experts; the released code has 0.01 throughout."""


class ModelConfig(Config):
    """The pan-organ transformer."""

    size: Literal["nano", "tiny", "small", "base"] = "nano"
    """nano: 48 wide, 2 blocks, for laptops; tiny, small, base: the widths, depths and heads of ViT-T/S/B."""
    tokenizer: Literal["statistics", "patch"] = "statistics"
    """statistics: mean, log-sd and mean gradient of sub-blocks, then linear (learns fastest on small cohorts);
    patch: linear on raw voxels, as in ViT."""
    backbone: Literal["dense", "director-experts"] = "dense"
    """dense: a ViT; director-experts: every block's MLP is a pool of experts and one director."""
    hidden_multiple: Annotated[int, Field(gt=0, le=64)] = 4
    """Hidden width of an MLP (dense, expert or director) over the model's width. A pool of which K experts are active
    costs as much as a dense MLP at 1/K of its multiple."""
    experts: ExpertsConfig = ExpertsConfig()
    """Only for `director-experts`."""

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each."""
        match self.backbone:
            case "dense":
                return
            case "director-experts":
                if any(self.experts.balance_weight):
                    yield "experts.balance-weight: it pulls on the batch's mean, set [0.0, 0.0]"
            case _:
                assert_never(self.backbone)


class LatentConfig(Config):
    """Regress the teacher's features of what was hidden (data2vec-style, per patient)."""

    name: Literal["latent"] = "latent"
    top_blocks: Annotated[int, Field(gt=0, le=64)] = 2
    """Targets are the mean of the normalised outputs of this many last teacher blocks."""
    beta: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.5
    """Smooth-L1 corner."""
    summary_weight: Weight = 1.0
    """Weight of the CLS loss: from CLS and an organ query, guess the teacher's summary of each organ present."""
    content_share: Fraction = 0.5
    """Share of the target's variance that is a fixed random projection of the token's own content; the rest is the
    teacher's. Keeps the teacher from drifting to what is easy to guess."""
    standardise: bool = True
    """Standardise targets per (stream, token, feature) by running statistics; turn off under privacy."""

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each."""
        if self.standardise:
            yield "standardise: running statistics couple patients, set false"


class DinoConfig(Config):
    """Self-distillation of prototype assignments of CLS and hidden tokens (DINO/iBOT-style)."""

    name: Literal["dino"]
    prototypes: Annotated[int, Field(gt=0, le=65_536)] = 256
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    centre_momentum: Fraction = 0.9

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each."""
        yield 'name: "dino" centres its targets over the batch, set "latent" or "mae"'


class MaeConfig(Uncoupled):
    """Reconstruct the normalised voxels of hidden patches."""

    name: Literal["mae"]


def _latent_unless_named(table: Any) -> Any:
    return {"name": "latent"} | table if isinstance(table, dict) else table


ObjectiveConfig = Annotated[
    LatentConfig | DinoConfig | MaeConfig, Field(discriminator="name"), BeforeValidator(_latent_unless_named)
]


class MaskingConfig(Config):
    """Which tokens are hidden from the student. Every policy hides the same number of tokens per patient."""

    policy: Literal["random", "organ", "sgm", "inverse", "static"] = "sgm"
    """random: uniform; organ: whole streams; sgm: more of the streams that the model leans on; inverse: less of them;
    static: more of `static-organs`, always."""
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.6
    """Share of a patient's tokens that is hidden."""
    saliency: Literal["attention", "value"] = "value"
    """attention: CLS row of the teacher's last block; value: CLS attention times the norm of the centred values, summed
    over all blocks."""
    scope: Literal["subject", "site", "federation"] = "site"
    """Whose saliency steers: this patient's, the site's running mean, or the mean the server sends."""
    strength: Annotated[float, Field(ge=0.0, le=100.0)] = 3.0
    """Slope of log-odds of hiding against log saliency."""
    limit: Annotated[float, Field(ge=1e-3, le=100.0)] = 3.0
    """Largest log-odds, either way: the most dominant stream is hidden more, but never always."""
    warmup_steps: Positive = 20
    """Local steps over which strength grows from 0."""
    settle_steps: Positive = 500
    """Local steps at full strength; over as many more it fades to what `balance` says."""
    balance: Fraction = 0.85
    """Once settled, guidance goes on only while the normalised entropy of the saliency over streams lies below this;
    0.1 below, at full strength."""
    static_organs: Annotated[tuple[str, ...], Field(strict=False)] = ("heart", "adipose")
    """Organs that `static` hides more."""

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each. Whatever its scope, saliency of more than one
        patient steers masks only after noise, as a mechanism of its own."""
        match self.policy:
            case "random" | "organ" | "static":
                return
            case "sgm" | "inverse":
                pass
            case _:
                assert_never(self.policy)
        match self.saliency:
            case "attention":
                return
            case "value":
                yield 'saliency: "value" is centred over the batch, set "attention", or masking.policy = "random"'
            case _:
                assert_never(self.saliency)


class TrainConfig(Uncoupled):
    """The local loop, and how much of it."""

    rounds: Annotated[int, Field(gt=0, le=1_000_000)] = 10
    local_steps: Annotated[int, Field(gt=0, le=1_000_000)] = 20
    """Optimiser steps per site and round."""
    validate_every: Positive = 5
    """Rounds between a site's validations of its own model, on its val split; the last round always ends with one."""
    batch_size: Annotated[int, Field(gt=0, le=65_536)] = 32
    """Patients per step."""
    learning_rate: Annotated[float, Field(ge=1e-9, le=10.0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.05
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    warmup: Fraction = 0.1
    """Share of the whole run over which the learning rate grows; then cosine to 0."""
    clip_norm: ClipNorm = 3.0
    teacher_momentum: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.99, 0.999)
    """EMA momentum of the teacher at the start and the end, by cosine."""
    teacher_start: Literal["own", "global", "server-ema"] = "own"
    """Where a site's teacher starts a round. own: where it ended the site's last one; global: at the parameters that
    the server sends, as the student does; server-ema: at the server's EMA of these, which is sent as well."""
    server_ema: BelowOne = 0.9
    """Momentum per round of that EMA."""
    proximal_mu: Annotated[float, Field(ge=0.0, le=1e3)] = 0.0
    """FedProx (arXiv 1812.06127): after each step, parameters go back by this x learning rate of their way from the
    round's global ones; apart from Adam's scaling, as weight decay is in AdamW."""
    precision: Literal["auto", "float32"] = "auto"
    """auto: bf16 autocast on CUDA, float32 on CPU."""
    threads: Annotated[int, Field(gt=0, le=256)] = 1
    """CPU threads per site; part of the run because it decides the last bits."""

    @property
    def total_steps(self) -> int:
        """Local steps of one site over the whole run."""
        return self.rounds * self.local_steps


class FederationConfig(Uncoupled):
    """How the round loop treats sites."""

    min_sites: Annotated[int, Field(gt=0, le=100_000)] = 2
    """A round needs this many good replies, and a run this many sites that shake hands."""
    round_timeout_s: Timeout = 3600.0
    """A site that has not answered by then is left out of the round."""
    join_timeout_s: Timeout = 120.0
    """How long to wait for sites before round 1. It ends when `min-sites` are there and no other comes for 10 s."""
    max_subjects: Positive = 1_000_000
    """A site that says it has more is refused: its word decides how much it may weigh."""
    max_share: Annotated[float, Field(ge=0.02, le=1.0)] = 0.5
    """Largest share of the weight of a group, or of a pooled expert, that one of three contributing sites or more has,
    whatever it says of itself; never less than an equal share (panfm/sharing/shares.py). Below 0.5 a server keeps up to
    1 / max-share updates of unequal sites in memory. Two sites count as they say: give a table of expected subjects
    (`python -m server start --roster`) where that is too much trust."""
    max_weight: Annotated[float, Field(ge=1.0, le=1e6)] = 1.0
    """A site weighs in a group at most this many times as much as the median site may, of three sites or more."""
    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the sites that is asked in a round, drawn anew each time; never fewer than `min-sites`."""
    sites_per_stream: Annotated[int, Field(gt=0, le=100_000)] = 1
    """A stream's parameters move only in rounds in which this many sites trained them; otherwise they stay as they
    are, and the round goes on. A stream that fewer sites hold is never trained by the federation."""


class ProbeConfig(Uncoupled):
    """Frozen-feature probes after training."""

    bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 200
    """Resamples of the test subjects for the interval."""
    missing_draws: Annotated[int, Field(gt=0, le=1_000)] = 3
    """Random organ subsets per number of missing organs."""


class RunConfig(Config):
    """One run."""

    name: Name
    seed: Seed = 0
    organs: Annotated[tuple[str, ...], Field(strict=False)] = DEFAULT_ORGANS
    streams: Annotated[dict[str, StreamConfig], Field(min_length=1)]
    cohort: CohortConfig | None = None
    """Where a simulation takes its sites from; left out in a deployment."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = LatentConfig()
    masking: MaskingConfig = MaskingConfig()
    train: TrainConfig = TrainConfig()
    sharing: SharingConfig = SharingConfig()
    federation: FederationConfig = FederationConfig()
    probe: ProbeConfig = ProbeConfig()
    privacy: PrivacyConfig | None = None
    """Differential privacy of patients; off when left out."""
    server_privacy: ServerPrivacyConfig | None = None
    """Differential privacy of sites, at the server; off when left out."""
    start: StartConfig | None = None
    """A trained model to start from; parameters are drawn by `seed` when left out."""

    @model_validator(mode="after")
    def _streams_are_known(self) -> Self:
        for stream in self.streams:
            organ, _ = parse_stream(stream)
            if organ not in self.organs:
                raise ValueError(f"streams.{stream}: organ {organ!r} is not in organs {list(self.organs)}")
        return self

    @model_validator(mode="after")
    def _cohort_streams_are_described(self) -> Self:
        named = self.cohort.named_streams if isinstance(self.cohort, StreamCohortConfig) else ()
        if unknown := [stream for stream in named if stream not in self.streams]:
            raise ValueError(f"cohort: stream {unknown[0]!r} is not in streams {list(self.streams)}")
        return self

    @model_validator(mode="after")
    def _groups_with_differences_travel(self) -> Self:
        """A guard or a mean for a group that is not there would be one that is silently off."""
        travel = {"backbone", "stream", *(f"stream:{stream}" for stream in self.streams)}
        travel |= {"head"} if self.sharing.head == "mean" else set()
        if self.model.backbone == "director-experts":
            travel |= {"director"} | ({"experts", "router"} if self.sharing.experts != "private" else set())
        if unknown := sorted(set(self.sharing.groups) - travel):
            raise ValueError(f"sharing.groups: {unknown[0]!r} does not travel in this run, expected {sorted(travel)}")
        return self

    @model_validator(mode="after")
    def _static_organs_have_streams(self) -> Self:
        """Unless they are the default and not used."""
        used = self.masking.policy == "static" or self.masking.static_organs != MaskingConfig().static_organs
        held = {parse_stream(stream)[0] for stream in self.streams}
        unknown = [organ for organ in self.masking.static_organs if organ not in held]
        if used and unknown:
            raise ValueError(f"masking.static-organs: no stream has organ {unknown[0]!r}, expected {sorted(held)}")
        return self

    @model_validator(mode="after")
    def _private_runs_keep_their_promise(self) -> Self:
        if self.privacy and self.train.proximal_mu:
            raise ValueError("train.proximal-mu: not done in private runs, set 0")
        if self.privacy and not self.privacy.acknowledge_broken_guarantee:
            for fault in broken_guarantees(self):
                raise ValueError(fault)
        if self.server_privacy:
            for fault in server_faults(self):
                raise ValueError(fault)
        return self
