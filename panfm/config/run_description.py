"""The description of one run, made of the tables of the other files.

One TOML file of this shape describes a run (`configs/experiments/*.toml`). The server resolves it once and sends the
resolved text to the sites, so every part of a federation reads the same words.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, SerializeAsAny, model_validator

from panfm.anatomy import DEFAULT_ORGANS, parse_stream
from panfm.config.augment import AugmentConfig
from panfm.config.base import Config, Name, Seed, TomlTable
from panfm.config.features import FeaturesConfig
from panfm.config.federation import FederationConfig
from panfm.config.gate import GateConfig
from panfm.config.masking import MaskingConfig
from panfm.config.model import TOKENIZER_INPUTS, ModelConfig
from panfm.config.objective import ObjectiveConfig
from panfm.config.parts import LoraConfig
from panfm.config.patient_dp import PatientDpConfig
from panfm.config.probe import ProbeConfig
from panfm.config.sharing import SharingConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.config.start import StartConfig
from panfm.config.streams import StreamConfig
from panfm.config.task import TaskConfig
from panfm.config.training import TrainConfig
from panfm.registry import BACKBONES
from panfm.texts import toml_key

SUPERVISED = "supervised"
"""Name of the objective of runs with `[task]`."""


class RunConfig(Config):
    """One run."""

    name: Name
    """Name of the run; its folder is `runs/<name>-<time>` unless `--out` says otherwise."""
    seed: Seed = 0
    """Seed of all random numbers of the run: initial parameters, batches, masks."""
    named_organs: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(default=None, alias="organs")
    """Organs that a site may have images of; when left out, the organs of the streams and the seven of Pan-FM."""
    streams: Annotated[dict[str, StreamConfig], Field(min_length=1)]
    """Stream (`<organ>-<modality>`, e.g. brain-mr or brain-mr.t1) -> how its images are prepared."""
    cohort: TomlTable | None = None
    """Where a simulation takes its sites from: a table that it checks itself. No site is told of it."""
    tracking: TomlTable | None = None
    """Loggers of the rounds at the coordinator, TensorBoard when left out: a table that the server checks itself. No
    site is told of it."""
    task: TaskConfig | None = None
    """Labels to learn: the run fine-tunes a head on them instead of pre-training; pre-training when left out."""
    model: ModelConfig = ModelConfig()
    objective: SerializeAsAny[ObjectiveConfig] = Field(default_factory=lambda: ObjectiveConfig.model_validate({}))
    augment: AugmentConfig | None = None
    """How images are varied; they are trained on as they are when left out."""
    masking: MaskingConfig = MaskingConfig()
    train: TrainConfig = TrainConfig()
    sharing: SharingConfig = SharingConfig()
    federation: FederationConfig = FederationConfig()
    features: FeaturesConfig = FeaturesConfig()
    probe: ProbeConfig = ProbeConfig()
    gate: GateConfig | None = None
    """Rounds that make the model worse are not kept; every round is when left out."""
    patient_dp: PatientDpConfig | None = None
    """Differential privacy of patients; off when left out."""
    site_dp: SiteDpConfig | None = None
    """Differential privacy of sites, at the server; off when left out."""
    start: StartConfig | None = None
    """A trained model to start from; parameters are drawn by `seed` when left out."""

    @property
    def organs(self) -> tuple[str, ...]:
        """Organs that a site may have images of: as named, else those of the streams and the seven of Pan-FM."""
        of_streams = (parse_stream(stream)[0] for stream in self.streams)
        return tuple(dict.fromkeys([*of_streams, *DEFAULT_ORGANS])) if self.named_organs is None else self.named_organs

    @model_validator(mode="before")
    @classmethod
    def _task_chooses_its_objective(cls, table: Any) -> Any:
        """Give a run with `[task]` the objective that learns labels, and a masking policy without saliency."""
        if not isinstance(table, dict) or table.get("task") is None:
            return table
        return {"objective": {"name": SUPERVISED}, "masking": {"policy": "random"}} | table

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        """Refuse a task beside settings that have no effect, or under which its head would not be one of all sites."""
        if self.task is None:
            if self.objective.name == SUPERVISED:
                raise ValueError(f'objective.name: "{SUPERVISED}" learns labels, expected a table [task]')
            if self.train.parts.kind == "head":
                raise ValueError('train.parts: "head" trains no encoder, expected a table [task]')
            return self
        if faults := [*self._task_faults()]:
            raise ValueError("; ".join(faults))
        return self

    def _task_faults(self) -> Iterator[str]:
        """Yield one line for each setting that does not go with `[task]`."""
        pooling = self.features.pooling
        if self.objective.name != SUPERVISED:
            yield f'objective.name: a run with [task] learns labels, leave it out (got "{self.objective.name}")'
        if self.masking.policy != "random":
            yield f'masking.policy: nothing is hidden in a run with [task], leave it out (got "{self.masking.policy}")'
        if self.sharing.head == "private":
            yield 'sharing.head: "private" would leave the run without the head of its task, set "mean"'
        if self.sharing.rule == "plain":
            yield 'sharing.rule: "plain" is a baseline of pre-training, set "grouped" in a run with [task]'
        if self.features.whitening:
            yield "features.whitening: would change the embedding under the head of the task, set false"
        if pooling.startswith("per-stream"):
            known = 'set "cls", "mean", "cls+mean" or "layers" in a run with [task]'
            yield f'features.pooling: "{pooling}" has other sizes where a site lacks a stream, {known}'

    @property
    def summed_streams(self) -> tuple[str, ...]:
        """Streams whose `input-centre` and `input-scale` are still to be computed from the sites' sums."""
        return tuple(name for name, stream in self.streams.items() if stream.lacks_constants)

    @model_validator(mode="after")
    def _streams_are_known(self) -> Self:
        for stream in self.streams:
            organ, _ = parse_stream(stream)
            if organ not in self.organs:
                where, known = toml_key("streams", stream), list(self.organs)
                raise ValueError(f"{where}: organ {organ!r} is not in organs {known}, add it or leave organs out")
        return self

    @model_validator(mode="after")
    def _groups_with_differences_travel(self) -> Self:
        """Refuse settings of a group that the run does not send: they would have no effect."""
        travel = {"backbone", "stream", *(f"stream:{stream}" for stream in self.streams)}
        travel |= {"head"} if self.sharing.head == "mean" else set()
        if set(self.sharing.groups) - travel:  # asking a backbone imports torch
            kept = {"experts", "router"} if self.sharing.experts == "private" else set()
            travel |= BACKBONES.load(self.model.backbone).sharing_groups - kept
        if unknown := sorted(set(self.sharing.groups) - travel):
            raise ValueError(f"sharing.groups: {unknown[0]!r} does not travel in this run, expected {sorted(travel)}")
        return self

    @model_validator(mode="after")
    def _private_lora_trains_one_factor(self) -> Self:
        parts = self.train.parts
        if self.patient_dp and isinstance(parts, LoraConfig) and not parts.frozen_a:
            raise ValueError("train.parts.frozen-a: both factors would get noise in a private run, set true")
        return self

    @model_validator(mode="after")
    def _gate_has_labels(self) -> Self:
        if self.gate and self.gate.measure == "labels" and not self.probe.tasks:
            raise ValueError('gate.measure: "labels" needs probe.tasks, e.g. { stroke = ["stroke"] }')
        return self

    @model_validator(mode="after")
    def _inputs_have_their_constants(self) -> Self:
        """Refuse more or fewer constants than a stream's tokenizer has inputs."""
        for name, stream in self.streams.items():
            inputs = stream.channels * TOKENIZER_INPUTS[self.model.tokenizer]
            for key, numbers in (("centre", stream.input_centre), ("scale", stream.input_scale)):
                if numbers is not None and len(numbers) != inputs:
                    tokenizer = f'the tokenizer "{self.model.tokenizer}" has {inputs} inputs'
                    where = toml_key("streams", name, f"input-{key}")
                    raise ValueError(f"{where}: {len(numbers)} numbers, {tokenizer}")
        return self

    @model_validator(mode="after")
    def _augmentation_fits(self) -> Self:
        """Refuse tables of streams that are not there, and an objective that compares views without augmentation."""
        if self.augment is None:
            if self.objective.num_views > 1:
                raise ValueError(f'objective.name: "{self.objective.name}" compares views, expected a table [augment]')
            return self
        for name in self.augment.streams:
            if name not in self.streams:
                raise ValueError(f"augment.streams: found {name!r}, expected some of {', '.join(self.streams)}")
            self.augment.check_stream(name, self.streams[name])
        return self

    @model_validator(mode="after")
    def _static_organs_have_streams(self) -> Self:
        """Unless they are the default and not used."""
        used = self.masking.policy == "static" or self.masking.static_organs != MaskingConfig().static_organs
        organs = {parse_stream(stream)[0] for stream in self.streams}
        unknown = [organ for organ in self.masking.static_organs if organ not in organs]
        if used and unknown:
            raise ValueError(f"masking.static-organs: no stream has organ {unknown[0]!r}, expected {sorted(organs)}")
        return self
