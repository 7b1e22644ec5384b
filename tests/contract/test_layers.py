"""Who may import whom, read off the syntax trees."""

import ast
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import panfm

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("panfm", "strategies", "server", "client", "simulations")
ALLOWED = {
    "panfm": {"panfm"},
    "strategies": {"strategies", "panfm"},
    "client": {"client", "panfm"},
    "server": {"server", "strategies", "panfm"},
    "simulations": set(HOUSE),
}
LEVELS = (
    (
        "errors",
        "extras",
        "json_log",
        "seeds",
        "anatomy",
        "registry",
        "installed_plug_ins",
        "config",
        "files",
        "outputs",
        "hash_chain",
        "texts",
        "cells",
        "certificates",
    ),
    ("data", "models", "sharing"),
    ("training", "privacy", "evaluate"),
    ("site", "report", "export", "planning", "finetune"),
    ("cli", "notebook"),
    ("__main__", "superlink_database"),
)
"""Parts of panfm, from the bottom; a part imports its own level and those below."""
VAGUE = {"found", "each", "held", "what", "take", "come", "came"}
"""Names too vague for a variable, parameter or function."""
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", HOUSE)
def test_packages_import_only_what_they_may(package):
    assert sources(package)
    for path in sources(package):
        ours = {name.split(".")[0] for name in imports(path)} & set(HOUSE)
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {sorted(ours - ALLOWED[package])}"


@pytest.mark.parametrize("package", ["panfm"])
def test_the_library_knows_nothing_of_flower_and_ray(package):
    for path in sources(package):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"flwr", "ray"}, path.relative_to(ROOT)


def test_file_names_are_unique():
    """But for names that Flower asks for, and the files of an objective."""
    names = Counter(
        path.stem
        for package in HOUSE
        for path in sources(package)
        if path.stem not in ("__init__", "__main__", "app") and "objectives" not in path.parts
    )
    assert [name for name, count in names.items() if count > 1] == []


def names(path: Path) -> set[str]:
    """Names that a file gives to variables, parameters and functions, without underscores in front."""
    given = set()
    for node in nodes(path):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                given.add(name.lstrip("_"))
    return given


@pytest.mark.parametrize("package", HOUSE)
def test_names_say_what_a_thing_is(package):
    vague = {path.relative_to(ROOT).as_posix(): names(path) & VAGUE for path in sources(package)}
    assert {path: words for path, words in vague.items() if words} == {}


def test_the_library_imports_downwards_only():
    for path in sources("panfm"):
        part = path.relative_to(ROOT / "panfm").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in LEVEL, f"panfm/{part} stands on no level"
        for name in imports(path):
            words = name.split(".")
            if words[0] == "panfm" and len(words) > 1 and words[1] in LEVEL:
                assert LEVEL[words[1]] <= LEVEL[part], f"{path.relative_to(ROOT)} imports {name}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports by name, also inside functions and for types only."""
    files = {module_name(path): path for package in HOUSE for path in sources(package)}
    return {name: {other for other in imports(path) if other in files} - {name} for name, path in files.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules in circles, or between two circles; none where there is no circle."""
    left = set(graph)
    while outside := {name for name in left if not graph[name] & left or not any(name in graph[o] for o in left)}:
        left -= outside
    return sorted(left)


def test_no_import_circle_types_included():
    assert cycle(import_graph()) == []


def test_a_circle_is_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_private_parts_of_flower_are_touched_in_one_file():
    users = [path for package in HOUSE for path in sources(package) if "TaskIdentity" in path.read_text()]
    assert users == [ROOT / "simulations" / "engines" / "local.py"]


@pytest.mark.parametrize("name", ["server/app.py", "client/app.py"])
def test_apps_are_thin(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    kind = {"server/app.py": "ServerApp", "client/app.py": "ClientApp"}[name]
    assert f"\napp = {kind}()\n" in text


def test_every_package_that_is_imported_has_an_init():
    for package in HOUSE:
        for path in sources(package):
            assert (path.parent / "__init__.py").exists(), path.parent.relative_to(ROOT)


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert panfm.__version__ == project["version"]
    simulation = tomllib.loads((ROOT / "distributions" / "simulation" / "pyproject.toml").read_text(encoding="utf-8"))
    assert simulation["project"]["version"] == project["version"]
    assert simulation["project"]["dependencies"] == [f"panfm[simulation]=={project['version']}"]
