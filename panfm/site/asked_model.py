"""Loads the global model that a question names, after some round of a run, and embeds patients of the site with it."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from panfm.evaluate.embed import embed_store
from panfm.models import PanModel, build_model
from panfm.sharing.sums_messages import SumsTask
from panfm.site.session import Session
from panfm.site.state import StateStore

_BATCH = 256


def load_model(session: Session, task: SumsTask, states: StateStore) -> None:
    """Put the parameters of a question in place. Raises as `sum_patients`."""
    states.check_origin()
    session.load_frozen(task.model, states)
    session.trainer.holds = None
    session.load_global(with_teacher(session, task).model, 0)


def with_teacher(session: Session, task: SumsTask) -> SumsTask:
    """The question with a teacher where the run's rounds come with one."""
    if session.run.train.teacher_start != "server-ema":
        return task
    return replace(task, model=replace(task.model, teacher=task.model.groups))


def embed_patients(session: Session, at: NDArray[np.int64]) -> NDArray[np.float32]:
    """Features [n, D] of subjects of a site by the model with all streams of the run; those it lacks are zero."""
    size = min(_BATCH, session.run.train.batch_size)
    return embed_store(whole_model(session), session.store, at, list(session.streams), batch_size=size)


def whole_model(session: Session) -> PanModel:
    """The model with all streams of the run, as the site's trainer has it now."""
    trainer, model = session.trainer, build_model(session.run)
    state = {name: value.to("cpu") for name, value in trainer.model.state_dict().items()}
    model.load_state_dict(model.state_dict() | state)
    return model.to(trainer.device)
