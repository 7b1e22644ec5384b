"""Goes on with a finished run for more rounds: `panfm simulate --resume RUN --extend rounds=40`.

The sites' private states say which experiment they come from, and a description with more rounds is another one. In a
simulation the states lie in the run folder, and are written anew under the new description; a hospital's are its own.

The learning rate follows the schedule of the longer run from its next step on, so that an extended run has other bits
than one that was described with as many rounds from the start.
"""

from dataclasses import replace
from pathlib import Path

from panfm.config import description_hash, dump_toml, parse_run
from panfm.errors import ConfigError, DataError
from panfm.files import RoundFiles
from panfm.privacy.guarantees import privacy_label
from panfm.site.state import RUNS, Origin, StateStore, read_origin
from server.run_folder import RunFolder


def extend(folder: RunFolder, rounds: int) -> RunFolder:
    """Describe a finished run anew, with more rounds.

    Args:
        rounds: Of the whole run.
    Returns:
        The folder of the run with its new description.
    Raises:
        ConfigError: the run is private or has not finished, or has as many rounds already.
        DataError: a site's private state is damaged.
    """
    state, known = folder.latest_state(), folder.run.train.rounds
    if privacy_label(folder.run) != "none":
        raise ConfigError(
            f"{folder.path}: is a private run, whose noise was chosen for {known} rounds; start a new run"
        )
    done = state.round_number if state else 0
    if state is None or done < known:
        raise ConfigError(f"{folder.path}: {done} of {known} rounds are done; finish them first, without --extend")
    if rounds <= known:
        raise ConfigError(f"--extend rounds={rounds}: the run has {known} rounds already, expected more")
    train = folder.run.train.model_copy(update={"rounds": rounds})
    longer = parse_run(dump_toml(folder.run.model_copy(update={"train": train})))
    extended = RunFolder(folder.path, longer)
    for states in sorted(folder.path.glob(f"sites/*/{RUNS}/{state.run_id}")):
        _name_experiment(states, description_hash(extended.run))
    extended.describe()
    return extended


def _name_experiment(folder: Path, experiment: str) -> None:
    """Write the newest private state of a folder under another experiment, and remove the older ones."""
    files = RoundFiles(folder)
    *older, newest = files.rounds()
    origin = read_origin(files.path(newest))
    if origin is None:
        raise DataError(f"{files.path(newest)}: does not say which experiment it comes from")
    store = StateStore(folder.parents[1], folder.name, replace(Origin(**origin), experiment=experiment))
    state = store.load(newest)
    for number in older:
        files.path(number).unlink()
    store.save(newest, state)
