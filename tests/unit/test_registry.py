"""Plug-ins from outside of the library: by decorator, and by entry points of installed packages."""

import sys
from importlib.metadata import EntryPoint

import pytest

import panfm
from panfm import installed_plug_ins, registry
from panfm.config import parse_run
from panfm.data.readers import ImageError, find_reader
from panfm.errors import ConfigError
from panfm.notebook.public_names import plug_in
from panfm.privacy.guarantees import checked_run
from panfm.registry import Registry
from tests.conftest import SMALL_RUN

UNDECLARED = """
import panfm
from panfm.config.objective import ObjectiveConfig

@panfm.objective("undeclared")
class UndeclaredConfig(ObjectiveConfig):
    implementation = "panfm.training.objectives.mae.objective:MaeObjective"
    name: str = "undeclared"

class DeclaredConfig(UndeclaredConfig):
    name: str = "declared"

    def couplings(self):
        return iter(())
"""
PRIVATE = """
[masking]
policy = "random"
[patient-dp]
epsilon = 8.0
delta = 1e-5
public-subjects = 1000
noise-multiplier = 1.0
sample-rate = 0.1
"""


class Shape:
    """A plug-in of this module."""


def table(**built_in):
    return Registry("shape.name", built_in)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs a package's entry points, for one test: its module's text, and name -> object in it."""
    tables = (registry.OBJECTIVES, registry.READERS, registry.MASKING_POLICIES)
    for known in tables:
        monkeypatch.setattr(known, "_targets", dict(known._targets))
    monkeypatch.syspath_prepend(tmp_path)
    points: list[EntryPoint] = []
    monkeypatch.setattr(
        installed_plug_ins, "entry_points", lambda group: [point for point in points if point.group == group]
    )
    installed_plug_ins.installed_plug_ins.cache_clear()

    def install(group, text, **objects):
        (tmp_path / "outside_plug_in.py").write_text(text)
        points.extend(EntryPoint(name, f"outside_plug_in:{place}", group) for name, place in objects.items())

    yield install
    installed_plug_ins.installed_plug_ins.cache_clear()
    sys.modules.pop("outside_plug_in", None)


def test_a_decorated_class_is_found_by_its_name():
    shapes = table(round="tests.unit.test_registry:Shape")

    @plug_in(shapes, "square")
    class Square: ...

    assert shapes.names == ("round", "square")
    assert shapes.load("square") is Square
    assert shapes.load("round").__name__ == "Shape"


def test_a_name_is_given_once_but_a_cell_may_run_again():
    shapes = table(round="tests.unit.test_registry:Shape")
    shapes.register("round", Shape)
    first, second = (plug_in(shapes, "square")(type("Square", (), {})) for _ in range(2))
    assert shapes.load("square") is second is not first
    with pytest.raises(ConfigError, match=r"shape.name: 'round' is registered already, expected another name for"):
        plug_in(shapes, "round")(type("Other", (), {}))


@pytest.mark.parametrize("name", ["objective", "masking", "backbone", "mean", "reader"])
def test_every_point_has_a_decorator_in_the_package(name):
    point = getattr(panfm, name)
    table = {"masking": "MASKING_POLICIES"}.get(name, f"{name}s".upper())
    assert point.args == (getattr(registry, table),)
    with pytest.raises(AttributeError, match="module 'panfm' has no attribute 'objectives'"):
        panfm.objectives  # noqa: B018


def test_an_installed_objective_is_imported_when_a_run_names_it(installed):
    installed("panfm.objectives", UNDECLARED, declared="DeclaredConfig")
    parse_run(SMALL_RUN + '[objective]\nname = "mae"\n')
    assert "outside_plug_in" not in sys.modules
    run = parse_run(SMALL_RUN + '[objective]\nname = "declared"\n')
    assert type(run.objective).__module__ == "outside_plug_in"


def test_an_installed_objective_without_a_declaration_is_refused_in_private_runs(installed):
    installed("panfm.objectives", UNDECLARED, undeclared="UndeclaredConfig", declared="DeclaredConfig")
    for name in ("undeclared", "declared"):
        parse_run(SMALL_RUN + f'[objective]\nname = "{name}"\n')
    checked_run(parse_run(SMALL_RUN + '[objective]\nname = "declared"\n' + PRIVATE))
    with pytest.raises(ConfigError, match='"undeclared" does not declare whether it couples patients, set one that'):
        checked_run(parse_run(SMALL_RUN + '[objective]\nname = "undeclared"\n' + PRIVATE))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import absent_library", "ModuleNotFoundError.*absent_library"),
        ("raise OSError('first\\nsecond')", "OSError.*first"),
        ("x = 1", "AttributeError.*DeclaredConfig"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_broken_plug_in_is_one_line(installed, text, reason):
    installed("panfm.objectives", text, declared="DeclaredConfig")
    with pytest.raises(ConfigError, match=rf"objective.name: 'declared' \(outside_plug_in.*imported: {reason}") as told:
        registry.OBJECTIVES.load("declared")
    assert len(str(told.value).splitlines()) == 1
    parse_run(SMALL_RUN + '[objective]\nname = "mae"\n')


def test_a_package_may_not_take_the_name_of_another(installed):
    installed("panfm.objectives", "", latent="Mine")
    with pytest.raises(ConfigError, match="'latent' is registered already, expected another name for outside_plug_in"):
        registry.OBJECTIVES.check("cosine")


def test_an_unknown_name_is_told_with_those_that_are_installed(installed):
    installed("panfm.objectives", UNDECLARED, declared="DeclaredConfig")
    with pytest.raises(ConfigError, match=r"found 'declard', expected one of latent.*, did you mean 'declared'"):
        parse_run(SMALL_RUN + '[objective]\nname = "declard"\n')


def test_an_installed_reader_comes_after_ours(installed, tmp_path):
    text = "class AnyReader:\n    kind = 'anything'\n    accepts = lambda self, path: path.suffix != '.other'\n"
    installed("panfm.readers", text, anything="AnyReader")
    (tmp_path / "a.nii").touch()
    assert type(find_reader(tmp_path / "a.nii")).__name__ == "NiftiReader"
    assert "outside_plug_in" not in sys.modules
    assert type(find_reader(tmp_path / "a.slices")).__name__ == "AnyReader"
    (tmp_path / "a.other").touch()
    with pytest.raises(ImageError, match=r"a kind of image that no reader accepts.* or anything"):
        find_reader(tmp_path / "a.other")
