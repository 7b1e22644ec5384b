"""Keeps the models that sites reach alone, so that the next run of the same description need not train them again.

A file's name is a hash of everything that a model depends on: the source code of `panfm` and `simulations`, Python and
all installed packages, how torch was built and what it computes on, the run description, the site's name, the start's
parameters, and the images, labels and splits that are trained on, value by value. Whatever changes, the name changes
with it, and the model is trained again. Nothing is kept where a plug-in takes part, since its code is not in the hash.
"""

import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import panfm
import simulations
from panfm.config import RunConfig, dump_toml
from panfm.data.store import ImageStore
from panfm.files import write_atomic
from panfm.models import PanModel, build_model
from panfm.registry import BACKBONES, MASKING_POLICIES, import_class

FOLDER = Path(".panfm", "alone")
"""Of a site's folder, with the kept files."""
_PACKAGES = (panfm, simulations)
"""Packages whose source files decide the bits of a trained model."""
_LOADED_AT = time.time()
_SETTLED_S = 60.0
"""A source file that changed later than this before `_LOADED_AT` may not be the one that was loaded."""
_MOST_KEPT = 2
"""Files of a site, the newest: one is as large as the model."""
_ROWS = 64
"""Images that are hashed at a time."""


def kept_or_trained(
    folder: Path, key: str | None, run: RunConfig, store: ImageStore, train: Callable[[], PanModel]
) -> PanModel:
    """The kept model with a key, or a newly trained one, which is then kept; always trained without a key.

    Args:
        folder: Of the site.
        run: The description that the model is built from.
        store: Decides the streams of the model.
    """
    if key is None:
        return train()
    path = folder / FOLDER / f"{key}.safetensors"
    with suppress(OSError, SafetensorError):
        state = safetensors.torch.load(path.read_bytes())
        model = build_model(run, [name for name in run.streams if name in store.images])
        model.load_state_dict(state)
        return model
    model = train()
    with suppress(OSError):  # a folder that cannot be written to keeps nothing
        write_atomic(path, safetensors.torch.save({name: value.clone() for name, value in model.state_dict().items()}))
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)[:-_MOST_KEPT]:
            old.unlink(missing_ok=True)
    return model


def model_key(run: RunConfig, store: ImageStore, name: str, start: Mapping[str, Tensor] | None) -> str | None:
    """Hash of all that the model which a site of this name reaches alone depends on; None if that cannot be told:
    with a plug-in, or with source code that may have changed since it was loaded."""
    if _has_plug_in(run) or _has_new_code():
        return None
    digest = hashlib.sha256()
    for part in (*_software(), dump_toml(run).encode(), name.encode(), *_content(store), *_parameters(start or {})):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _has_plug_in(run: RunConfig) -> bool:
    """Whether objective, masking policy or backbone of a run are defined outside of the code that is hashed."""
    classes = (
        type(run.objective),
        import_class(run.objective.implementation),
        MASKING_POLICIES.load(run.masking.policy),
        BACKBONES.load(run.model.backbone),
    )
    packages = {package.__name__ for package in _PACKAGES}
    return any(plug_in.__module__.partition(".")[0] not in packages for plug_in in classes)


def _source_files() -> Iterator[tuple[Path, Path]]:
    """Yield root and path of each file of the packages."""
    for package in _PACKAGES:
        root = Path(package.__path__[0])
        yield from ((root, path) for path in sorted(root.rglob("*.py")))


def _has_new_code() -> bool:
    return any(path.stat().st_mtime > _LOADED_AT - _SETTLED_S for _, path in _source_files())


@cache
def _installed() -> str:
    return "\n".join(sorted(f"{package.name} {package.version}" for package in importlib.metadata.distributions()))


def _software() -> Iterator[bytes]:
    for root, path in _source_files():
        yield str(path.relative_to(root)).encode()
        yield path.read_bytes()
    yield sys.version.encode()
    yield _installed().encode()
    yield torch.__config__.show().encode()
    yield f"{torch.get_num_threads()} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}".encode()


def _content(store: ImageStore) -> Iterator[bytes]:
    yield repr((store.subjects, store.splits, sorted(store.sessions.items()))).encode()
    labels = {} if store.labels is None else {"labels": store.labels}
    for arrays in (store.images, store.rows, labels):
        for name, values in arrays.items():
            yield f"{name} {values.shape} {values.dtype}".encode()
            yield from (values[start : start + _ROWS].tobytes() for start in range(0, len(values), _ROWS))


def _parameters(state: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, value in state.items():
        yield f"{name} {tuple(value.shape)} {value.dtype}".encode()
        yield value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
