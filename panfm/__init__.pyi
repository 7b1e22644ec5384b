"""Types of the names that `panfm` imports when they are first used."""

from collections.abc import Callable
from typing import TypeVar

from panfm.notebook.loaded_model import Model as Model
from panfm.notebook.loaded_model import load as load
from panfm.notebook.run_tables import runs as runs

_Class = TypeVar("_Class", bound=type)
__version__: str

def objective(name: str) -> Callable[[_Class], _Class]: ...
def masking(name: str) -> Callable[[_Class], _Class]: ...
def backbone(name: str) -> Callable[[_Class], _Class]: ...
def mean(name: str) -> Callable[[_Class], _Class]: ...
def reader(name: str) -> Callable[[_Class], _Class]: ...
