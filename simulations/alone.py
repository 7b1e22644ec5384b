"""Training without a federation: one site by itself, or everybody's images in one place.

The same Trainer, loop, seeds and schedule as in a federation, without messages in between.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.models import PanModel
from panfm.training.trainer import Trainer


def train_alone(
    run: RunConfig,
    store: ImageStore,
    name: str,
    *,
    start: Mapping[str, Tensor] | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> PanModel:
    """Train on one store for as many rounds and local steps as a site of the federation takes.

    Args:
        name: Stands for the site in the seeds.
        start: Shared parameters of a warm start.
        on_round: Called with the number of rounds done.
    Returns:
        The model, over the store's streams only.
    """
    trainer = Trainer(run, [stream for stream in run.streams if stream in store.images])
    if start:
        trainer.load_shared({name: start[name] for name in trainer.shared_state()})
        trainer.reset_private()
    for done in range(run.train.rounds):
        trainer.train(
            store,
            store.indices("train"),
            first_step=done * run.train.local_steps,
            num_steps=run.train.local_steps,
            site=name,
            round_number=done + 1,
        )
        on_round(done + 1)
    return trainer.model.cpu()
