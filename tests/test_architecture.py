"""No import runs upward, not even for type checking, there is no circle, and nobody uses another file's privates."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_rdrop

PACKAGE = Path(lightning_rdrop.__file__).parent
FLOORS = [
    "_compat _lightning arguments composite extras description divergence labels nesting optimizer_steps plots probe "
    "schedule submodules terms",
    "data_views own_losses transforms views",
    "_fused cross_entropy dropout",
    "distance",
    "loss metrics scales",
    "guard late_duplication",
    "draw",
    "hooks inheritance unlabeled",
    "regularizers",
    "checkpoint",
    "mixin",
    "simcse",
    "predict",
    "callbacks",
    "data",
    "modules",
    "quickstart",
    "lightning_cli",
    "compare",
    "cli",
    "__init__ __main__ docs",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = {path.relative_to(PACKAGE).with_suffix("").parts: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def file_of(dotted):
    """The file that is imported by this name, or that defines it; None outside the package."""
    first, *parts = dotted.split(".")
    for end in range(len(parts), -1, -1):
        for file in (tuple(parts[:end]), (*parts[:end], "__init__")):
            if first == "lightning_rdrop" and file in FILES:
                return file
    return None


def imports(file):
    """The dotted name of everything that a file imports, wherever in it."""
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{'/'.join(file)}.py: write imports in full, without leading dots"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(file):
    return {found for name in imports(file) if (found := file_of(name)) is not None}


def privates(file):
    """The private names that a file defines, at any depth."""
    for node in ast.walk(FILES[file]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def is_private(name):
    return name.strip("_") != "" and name.startswith("_") and not name.startswith("__")


DEFINED = {file: {name for name in privates(file) if is_private(name)} for file in FILES}
EVERY_FILE = pytest.mark.parametrize("file", sorted(FILES), ids="/".join)


@EVERY_FILE
def test_every_file_has_a_floor(file):
    assert file[0] in FLOOR, f"{file[0]} is new: put it on a floor of FLOORS, above all that it imports"


@EVERY_FILE
def test_no_import_runs_upward(file):
    upward = {other for other in imported(file) if FLOOR.get(other[0], 0) > FLOOR.get(file[0], len(FLOORS))}
    assert not upward, f"{'/'.join(file)}.py imports from a floor above its own"


def test_there_is_no_circle():
    try:
        TopologicalSorter({file: imported(file) - {file} for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join("/".join(file) for file in error.args[1]))


@EVERY_FILE
def test_nobody_uses_the_privates_of_another_file(file):
    theirs = set().union(*(names for other, names in DEFINED.items() if other != file)) - DEFINED[file]
    names = {name.rpartition(".")[2] for name in imports(file) if file_of(name) is not None}
    attributes = {node.attr for node in ast.walk(FILES[file]) if isinstance(node, ast.Attribute)}
    used = (names | attributes) & theirs
    assert not used
