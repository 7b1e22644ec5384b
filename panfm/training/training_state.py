"""One site's model in training: student, teacher, optimiser, running statistics.

The state comes in two parts: shared (parameters of the student, by the run's `[sharing]`) and private (everything
else), so that a site can send the one and keep the other. `trainer.py` moves it.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from panfm.config import RunConfig
from panfm.config.training import TrainConfig
from panfm.data.store import ImageStore
from panfm.errors import ConfigError
from panfm.models import PanModel, build_model
from panfm.models.pan import is_tokens
from panfm.models.private_part import load_with_fresh_private
from panfm.privacy.guarantees import checked_run
from panfm.training.feature_store import feature_store
from panfm.training.objectives.interface import build_objective

if TYPE_CHECKING:
    from panfm.data.augmentation import Augmentation

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Student, teacher and optimiser over some of a run's streams.

    Guarantees:
        promised: a run that cannot keep the privacy that it promises is refused.
        exact: after `load_shared` and `load_private` of saved states, training goes on with the same bits.
    """

    def __init__(self, run: RunConfig, streams: Sequence[str] | None = None) -> None:
        self.run = checked_run(run)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(run, streams).to(self.device)
        if run.train.activations == "recomputed":
            self.model.backbone.recompute()
        _check_buffers(run, self.model)
        self.augmentation = _augmentation(run, self.model)
        self.parameters = _trained(self.model, self.model.trained)
        """Parameters that the run trains, in the order in which the optimiser's state is packed."""
        self._start = {name: value.clone() for name, value in self._private_parameters().items()}
        self.objective = build_objective(run.objective, self.model, seed=run.seed)
        self.has_teacher = self.objective.needs_teacher or run.masking.steered_by is not None
        self.teacher = _teacher_of(self.model) if self.has_teacher else self.model
        """The student itself where neither objective nor masking has use for a teacher."""
        self._teacher_parameters = _trained(self.teacher, self.model.trained) if self.has_teacher else []
        self.reset_private()
        self.holds: tuple[object, str] | None = None
        """Whose private state is in place, and its digest: a note of those who take turns at the trainer."""
        self.has_frozen = not self.frozen_state()
        """Whether the shared parameters that are not trained are the run's; nothing moves them."""
        self._anchor: dict[str, Tensor] = {}
        self._feature_stores: WeakKeyDictionary[ImageStore, ImageStore] = WeakKeyDictionary()

    def reset_private(self) -> None:
        """Start the private part afresh.

        Private experts are copies of the director that is in place, router and private heads are as the run's seed has
        them; the teacher equals the student, optimiser and statistics are empty.
        """
        load_with_fresh_private(self.model, self.run.sharing, self._shared_parameters(), self._start)
        self.restart_teacher()
        self.optimiser = build_optimiser(self.model, self.run.train)
        self.objective = build_objective(self.run.objective, self.model, seed=self.run.seed)
        self.profile = torch.ones(len(self.model.stream_names), device=self.device)
        for layer in self.model.director_experts().values():
            layer.router.reset_activation()

    def training_inputs(self, store: ImageStore) -> ImageStore:
        """The store that training steps draw from: images if the run augments them, else their patch features."""
        return store if self.augmentation else self.patch_features(store)

    def patch_features(self, store: ImageStore) -> ImageStore:
        """The store with patch features in its batches; few are computed once and kept as long as the store lives."""
        if self.run.model.tokenizer == "patch":
            return store
        if store not in self._feature_stores:
            self._feature_stores[store] = feature_store(store, self.model, self.device)
        return self._feature_stores[store]

    def set_gradient(self, gradient: Mapping[str, Tensor]) -> None:
        """Put a gradient in place, by name of parameter; parameters that it does not name get none."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradient[name].to(parameter.device) if name in gradient else None

    @torch.no_grad()
    def update_teacher(self, momentum: float, counts: Tensor) -> None:
        """teacher <- momentum teacher + (1 - momentum) student, if the step counts and there is a teacher."""
        share = self._share(1.0 - momentum, counts)
        if self.has_teacher:
            follow = follow_at_once if share.is_cuda else follow_in_turn
            follow(self._teacher_parameters, self.parameters, share)

    def _share(self, share: float, counts: Tensor) -> Tensor:
        """A number as a tensor, 0 if the step does not count."""
        return (share * counts.double()).to(self.model.dtype)

    def shared_state(self) -> dict[str, Tensor]:
        """The student's shared parameters that are trained, by name; copies."""
        state = self.model.travelling_state(self.run.sharing)
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def frozen_state(self) -> dict[str, Tensor]:
        """The shared parameters that are not trained, by name; copies."""
        state = self.model.frozen_state(self.run.sharing)
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_frozen(self, state: Mapping[str, Tensor]) -> None:
        """Load the shared parameters that are not trained, which student and teacher have in common; names must match
        exactly."""
        others = self._private_parameters() | self.model.travelling_state(self.run.sharing)
        self.model.load_state_dict(others | dict(state), strict=True)
        self.has_frozen = True

    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """Load the student's shared parameters that are trained, and begin the optimiser anew in a run whose rounds do;
        names must match exactly."""
        others = self._private_parameters() | self.model.frozen_state(self.run.sharing)
        self.model.load_state_dict(others | dict(state), strict=True)
        if self.run.train.optimiser_state == "fresh":
            self.optimiser = build_optimiser(self.model, self.run.train)
        if self.run.train.proximal_mu:
            self._anchor = {name: value.to(self.device, copy=True) for name, value in state.items()}

    @torch.no_grad()
    def proximal_step(self, share: float, counts: Tensor) -> None:
        """Move shared parameters back by a share of their way from those last loaded, if the step counts; nothing if
        none were."""
        if share and self._anchor:
            for name, parameter in self.model.named_parameters():
                if name in self._anchor:
                    parameter.lerp_(self._anchor[name], self._share(share, counts))

    def restart_teacher(self) -> None:
        """Set the teacher to the student."""
        self.load_teacher(self.model.state_dict())

    def load_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Load some of the teacher's parameters, if there is a teacher; the others stay."""
        if self.has_teacher:
            self.teacher.load_state_dict(self.teacher.state_dict() | dict(state))

    def private_state(self) -> dict[str, Tensor]:
        """Everything else that training depends on: the student's private parameters, teacher, optimiser, statistics,
        experts' activation, saliency profile."""
        state = {f"student.{name}": value for name, value in self._private_parameters().items()}
        teacher = self.teacher.state_dict() if self.has_teacher else {}
        state |= {f"teacher.{name}": value for name, value in teacher.items() if name in self.model.trained}
        if self.run.train.optimiser_state == "kept":
            state |= {f"optimiser.{slot}": packed for slot, packed in self._optimiser_state().items()}
        state |= {f"objective.{name}": value for name, value in self.objective.state().items()}
        layers = self.model.director_experts()
        state |= {f"activation.{name}": layer.router.activation for name, layer in layers.items()}
        state["saliency.profile"] = self.profile
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_private(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `private_state` returned."""
        if own := _under(state, "student."):
            self.model.load_state_dict(self._shared_parameters() | own, strict=True)
        if self.has_teacher:
            frozen = {name: value for name, value in self.model.state_dict().items() if name not in self.model.trained}
            self.teacher.load_state_dict(frozen | _under(state, "teacher."), strict=True)
        if self.run.train.optimiser_state == "kept":
            self._load_optimiser_state(_under(state, "optimiser."))
        self.objective.load_state(_under(state, "objective."))
        for name, layer in self.model.director_experts().items():
            layer.router.activation.copy_(state[f"activation.{name}"])
        self.profile = state["saliency.profile"].to(self.device, copy=True)

    def _optimiser_state(self) -> dict[str, Tensor]:
        """AdamW's slots of all trained parameters, packed one after the other; zeros for one that it has not moved
        yet."""
        slots = [self.optimiser.state.get(parameter, {}) for parameter in self.parameters]
        never = torch.zeros((), device=self.device)
        packed = {"step": torch.stack([slot.get("step", never) for slot in slots])}
        for slot in _MOMENTS:
            pairs = zip(self.parameters, slots, strict=True)
            moments = [kept.get(slot, torch.zeros_like(parameter)) for parameter, kept in pairs]
            packed[slot] = torch.cat([moment.reshape(-1) for moment in moments])
        return packed

    def _load_optimiser_state(self, packed: Mapping[str, Tensor]) -> None:
        self.optimiser = build_optimiser(self.model, self.run.train)
        sizes = [parameter.numel() for parameter in self.parameters]
        moments = zip(*(packed[slot].split(sizes) for slot in _MOMENTS), strict=True)
        for parameter, step, values in zip(self.parameters, packed["step"], moments, strict=True):
            if step:
                slots = {slot: value.view_as(parameter) for slot, value in zip(_MOMENTS, values, strict=True)}
                kept = {"step": step, **slots}.items()
                self.optimiser.state[parameter] = {slot: value.to(self.device, copy=True) for slot, value in kept}

    def _shared_parameters(self) -> dict[str, Tensor]:
        return self.model.split_state(self.run.sharing)[0]

    def _private_parameters(self) -> dict[str, Tensor]:
        return self.model.split_state(self.run.sharing)[1]


def _augmentation(run: RunConfig, model: PanModel) -> "Augmentation | None":
    """The run's augmentation; None without `[augment]`."""
    if not run.augment:
        return None
    from panfm.data.augmentation import Augmentation  # a worker whose runs have none does without

    return Augmentation(run.augment, model.stream_configs)


def _trained(model: PanModel, names: Collection[str]) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name in names]


def _teacher_of(model: PanModel) -> PanModel:
    """A copy of a student, which shares the memory of the parameters that are not trained."""
    shared = {id(value): value for name, value in model.named_parameters() if name not in model.trained}
    return deepcopy(model, shared).requires_grad_(requires_grad=False)


def _check_buffers(run: RunConfig, model: PanModel) -> None:
    """Refuse a private run whose model would send or keep numbers that are no parameters, and so never get noise."""
    buffers = sorted(model.state_dict().keys() - dict(model.named_parameters()).keys())
    if run.patient_dp and buffers:
        raise ConfigError(f"model.backbone: {buffers[0]} is a buffer that training moves without noise, expected none")


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def follow_in_turn(followers: Sequence[Tensor], leaders: Sequence[Tensor], share: Tensor) -> None:
    """Move followers to their leaders by a share of the way, in place, one after the other."""
    for follower, leader in zip(followers, leaders, strict=True):
        follower.lerp_(leader, share)


def follow_at_once(followers: Sequence[Tensor], leaders: Sequence[Tensor], share: Tensor) -> None:
    """The same up to rounding, in a few kernels for all of them: on a GPU each launch costs."""
    ways = torch._foreach_sub([*leaders], [*followers])
    torch._foreach_mul_(ways, share)
    torch._foreach_add_([*followers], ways)


def build_optimiser(model: PanModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, and a group with its `scale` of the learning rate for every layer."""
    above: Mapping[str, int] = {}
    if config.layer_decay < 1.0:
        from panfm.models.trained_parts import layers_above  # a run with one rate does without

        above = layers_above(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.dim() <= 1 or ".experts.bias_" in name or is_tokens(name)
            groups.setdefault((above.get(name, 0), is_vector), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else config.weight_decay,
            "scale": config.layer_decay**layers,
        }
        for (layers, is_vector), parameters in sorted(groups.items())
    ]
    return torch.optim.AdamW(settings, lr=config.learning_rate, betas=config.betas, fused=True)
