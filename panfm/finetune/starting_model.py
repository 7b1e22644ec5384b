"""Reads the model from which a fine-tuning starts: a run's model as one set of plain weights."""

from pathlib import Path

from panfm.config import RunConfig
from panfm.config.features import FeaturesConfig
from panfm.config.parts import PlainPartsConfig
from panfm.errors import ConfigError
from panfm.evaluate.embed import load_model
from panfm.models import PanModel, build_model
from panfm.models.low_rank import fit_lora
from panfm.models.transfer import director_run, director_state, taskless_run, taskless_state
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.groups import EXPERTS, is_shared


def starting_model(
    folder: Path, *, pooling: FeaturesConfig | None = None, from_scratch: bool = False
) -> tuple[PanModel, RunConfig]:
    """Read a run's model for fine-tuning, without a whitening and without the head of a task that the run has learned.

    Guarantees:
        plain: low-rank additions are added to the weights; experts that their sites kept, which are copies of the
            director here, become a dense model. Neither changes what the model computes.
    Args:
        folder: That holds the weights and run.toml.
        pooling: Instead of the run's.
        from_scratch: Whether to return the model with the parameters that the run's seed draws.
    Raises:
        ConfigError: the model claims privacy, which fine-tuning would not keep, or its run.toml is not valid.
        DataError: the weights are not valid.
    """
    before, run = load_model(folder, pooling, whitened=False)
    if (label := privacy_label(run)) != "none":
        raise ConfigError(f"{folder}: fine-tuning adds no noise, expected a model without a privacy claim ({label})")
    run = run.model_copy(
        update={
            "features": run.features.model_copy(update={"whitening": False}),
            "train": run.train.model_copy(update={"parts": PlainPartsConfig()}),
        }
    )
    state = before.state_dict()
    if before.director_experts() and not is_shared(run.sharing, EXPERTS):
        run, state = director_run(run), director_state(before)
    if has_task := run.task is not None:
        run = taskless_run(run)
    model = build_model(run)
    if not from_scratch:
        fitted = fit_lora(state, model.state_dict())
        model.load_state_dict(taskless_state(fitted, model.state_dict()) if has_task else fitted)
    return model, run
