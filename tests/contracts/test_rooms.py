"""Which part of the package may import which, counting imports inside functions and for type checkers only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import losia_dist

PACKAGE = Path(losia_dist.__file__).parent

# Each row may import the rows above it. What stands in one row does not import each other.
ORDER = [
    ["_version", "errors", "formulas", "digits"],
    ["releases"],
    ["config"],
    ["ranks"],
    ["subnet"],
    ["localization", "sharding", "optim", "loss"],
    ["model"],
    ["run"],
    ["checkpoint"],
    ["export"],
    ["integrations", "data"],
    ["recipe"],
    ["cli"],
    ["__init__", "__main__"],  # the public names
]
# Rooms inside a room: likewise. "*": files that lie in the room itself, and import each other.
WITHIN = {
    "integrations": [["deepspeed", "distributed"], ["accelerate"], ["trainer"], ["axolotl"]],
    "tools": [["doctor", "plan", "report"]],
    "recipe": [["weights"], ["*"], ["trl"]],
}
TOOLS_IMPORT_UP_TO, TOOLS_ARE_IMPORTED_BY = "export", {"cli"}
ENGINES, ENGINE_ROOMS = {"deepspeed", "accelerate"}, {"sharding", "integrations"}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it; of this package by their names below it ("__init__": its public names)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, below = name.partition(".")
            if top != "losia_dist":
                yield name
                continue
            while below and below not in FILES:  # a name in a module
                below = below.rpartition(".")[0]
            yield f"losia_dist.{below or '__init__'}"


def own_imports(name: str) -> set[str]:
    found = {module.removeprefix("losia_dist.") for module in imported(FILES[name]) if module.startswith("losia_dist.")}
    return found - {name}


def row_of(table: list[list[str]], room: str) -> int:
    """The row that names the room, or the one for all files that no row names."""
    rows = [row for row, rooms in enumerate(table) if room in rooms or rooms == ["*"]]
    assert rows, f"{room} is in no row: say in this test what it may import"
    return rows[0]


def may_import(name: str, other: str) -> bool:
    (room, *inner), (target, *target_inner) = name.split("."), other.split(".")
    if room == target:
        if room not in WITHIN or not inner or not target_inner or inner[0] == target_inner[0]:
            return True
        mine, theirs = (row_of(WITHIN[room], part) for part in (inner[0], target_inner[0]))
        return theirs < mine or WITHIN[room][theirs] == WITHIN[room][mine] == ["*"]
    if target == "tools":
        return room in TOOLS_ARE_IMPORTED_BY
    if room == "tools":
        return row_of(ORDER, target) <= row_of(ORDER, TOOLS_IMPORT_UP_TO)
    return row_of(ORDER, target) < row_of(ORDER, room)


def test_imports_go_up_the_order_of_rooms_only():
    pairs = [(name, other) for name in FILES for other in sorted(own_imports(name))]
    wrong = [f"{name} imports {other}" for name, other in pairs if not may_import(name, other)]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    graph = {name: own_imports(name) & FILES.keys() for name in FILES}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    # What only imports a circle is no part of it.
    while roots := [name for name in graph if not any(name in others for others in graph.values())]:
        for name in roots:
            del graph[name]
    assert not graph, f"in a circle, or between two: {', '.join(sorted(graph))}"


def test_engines_are_imported_in_their_rooms_only():
    wrong = [
        f"{name} imports {module}"
        for name, path in FILES.items()
        if name.split(".")[0] not in ENGINE_ROOMS
        for module in imported(path)
        if module.split(".")[0] in ENGINES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("table", [ORDER, *WITHIN.values()])
def test_no_row_names_what_is_not_there(table):
    rooms = {part for name in FILES for part in (name or "__init__").split(".")[:2]}
    assert {room for row in table for room in row} - {"*"} <= rooms


def test_the_command_line_is_read_in_the_recipe_and_cli_only():
    readers = {name.split(".")[0] for name, path in FILES.items() if "argparse" in imported(path)}
    assert readers == {"recipe", "cli"}
