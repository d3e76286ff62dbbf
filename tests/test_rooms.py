"""examples/common/: each room knows the rooms before it, and none after it; nothing in it is a script or uses loralib.

Alone: `pytest tests/test_rooms.py`.
"""

import ast
from pathlib import Path

import pytest
from common import ROOMS

COMMON = Path(__file__).resolve().parents[1] / "examples" / "common"
GROUND = {"cli", "stopping", "files"}
MODULES = sorted(path for path in COMMON.rglob("*.py") if path.name != "__init__.py")


def imported(path):
    """The dotted names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "names of rooms in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_rooms_are_the_folders():
    assert set(ROOMS) == {path.parent.name for path in MODULES} - {"common"}
    assert {path.stem for path in COMMON.glob("*.py")} - {"__init__"} == GROUND
    said = ast.get_docstring(ast.parse((COMMON / "__init__.py").read_text(encoding="utf-8")))
    assert [line.split("`")[1] for line in said.splitlines() if line[:1].isdigit()] == list(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(COMMON).as_posix())
def test_imports_go_one_way(path):
    room = path.parent.name
    below = GROUND.union(ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ())
    for name in imported(path):
        package, *rest = name.split(".")
        assert package != "loralib" and not list((COMMON.parent).glob(f"**/{package}.py")), f"{name}: not of a script"
        assert package != "common" or rest[0] in below, f"{room} is before {rest[0]}"
    assert "__main__" not in path.read_text(encoding="utf-8")
