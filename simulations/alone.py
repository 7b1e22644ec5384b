"""Training without a federation: one site by itself, or everybody's images in one place.

The same Trainer, loop, seeds and schedule as in a federation, without messages in between.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from panfm.config import RunConfig, without_summed_constants
from panfm.data.store import ImageStore
from panfm.evaluate.input_sums import measured_constants, with_constants
from panfm.models import PanModel
from panfm.training.gradient import TrainResult
from panfm.training.trainer import Trainer
from simulations.cohorts.opened import join_stores


def train_alone(
    run: RunConfig,
    store: ImageStore,
    name: str,
    *,
    start: Mapping[str, Tensor] | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> PanModel:
    """Train on one store for as many rounds and local steps as a site of the federation takes.

    Args:
        run: Where its streams have constants of inputs from sums, those of this store stand in their place.
        name: Stands for the site in the seeds.
        start: Shared parameters of a warm start.
        kept: Private parameters, such as experts, to start from.
    Returns:
        The model, over the store's streams only.
    Raises:
        NoSubjectsError: nobody in the train split holds one of the run's streams.
    """
    store.members("train", name, run.streams)
    run = with_own_constants(run, store)
    trainer = Trainer(run, [stream for stream in run.streams if stream in store.images])
    if start:
        trainer.load_frozen({name: start[name] for name in trainer.frozen_state()})
        trainer.load_shared({name: start[name] for name in trainer.shared_state()})
        trainer.reset_private()
    if kept:
        trainer.model.load_state_dict(trainer.model.state_dict() | dict(kept))
        trainer.restart_teacher()
    for round_number in range(1, run.train.rounds + 1):
        train_round(trainer, store, name, round_number)
    return trainer.model.cpu()


def with_own_constants(run: RunConfig, store: ImageStore) -> RunConfig:
    """The run with a store's own constants of inputs, where its streams have constants from sums."""
    run = without_summed_constants(run)
    own = measured_constants(run, [store]) if run.summed_streams else {}
    return with_constants(run, {name: constants for name, constants in own.items() if name in run.summed_streams})


def train_round(trainer: Trainer, store: ImageStore, name: str, round_number: int) -> TrainResult:
    """Train for one round's local steps on the training subjects of a store, as a site of this name does."""
    num_steps = trainer.run.train.local_steps
    return trainer.train(
        store,
        store.indices("train"),
        first_step=(round_number - 1) * num_steps,
        num_steps=num_steps,
        site=name,
        round_number=round_number,
    )


def train_together(
    run: RunConfig, stores: Sequence[ImageStore], *, start: Mapping[str, Tensor] | None = None
) -> PanModel:
    """Train on the images of all sites in one place, for as many local steps as all sites together take.

    Args:
        start: As for `train_alone`.
    """
    train = run.train.model_copy(update={"local_steps": run.train.local_steps * len(stores)})
    return train_alone(run.model_copy(update={"train": train}), join_stores(stores), "everyone", start=start)
