"""The rooms: what the docs say of them is there, and what every command owes its user."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from rapo_verl.cli import app

CLONE = Path(__file__).parent.parent
LIBRARY = CLONE / "rapo_verl"
ROOMS = sorted(folder for folder in LIBRARY.iterdir() if (folder / "__init__.py").is_file())


def commands(group, words=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


COMMANDS = list(commands(get_command(app)))


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(CLONE)) for p in (CLONE / "docs").glob("*.md"))]
)
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:rapo_verl|recipe|slurm|tests|benchmarks|docs)/[\w./-]+\.\w+)`", (CLONE / page).read_text()
    )
    assert [name for name in named if not (CLONE / name).is_file()] == []


def test_architecture_names_every_room():
    text = (CLONE / "docs" / "architecture.md").read_text()
    assert [room.name for room in ROOMS if not re.search(rf"\b{room.name}\b", text)] == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_opens_with_what_lives_there(room):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


def test_top_floor_holds_rooms_only():
    assert [path.name for path in LIBRARY.glob("*.py")] == ["__init__.py"]


# Two sides of one thing: its mathematics and its file, its rule and its place in a trainer, its work and its command.
PAIRS = {"alarms", "figures", "head", "reference_answers", "verify"}


def test_one_name_is_one_thing():
    files = [path for path in LIBRARY.rglob("*.py") if not path.stem.startswith("__")]
    modules = Counter(path.stem for path in files)
    assert {name for name, count in modules.items() if count > 1} <= PAIRS
    classes = Counter(
        node.name
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_no_module_has_more_than_300_lines():
    assert [p.name for p in LIBRARY.rglob("*.py") if len(p.read_text().splitlines()) > 300] == []


def body_lines(function) -> int:
    """Lines of a function without its signature and its docstring."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return function.end_lineno - first.lineno + 1


def test_no_function_has_more_than_60_lines():
    functions = [
        (path.name, node.name, body_lines(node))
        for path in LIBRARY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [function for function in functions if function[2] > 60] == []


@pytest.mark.parametrize("words, command", COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help_of_every_command_has_an_example(words, command):
    assert f"Example: rapo {' '.join(words)}" in command.help


def test_help_shows_the_commands_in_groups():
    panels = {getattr(command, "rich_help_panel", None) for command in get_command(app).commands.values()}
    assert panels == {"Train", "Evaluate", "Data", "Look"}


@pytest.mark.parametrize("group", ["", *sorted({words[0] for words, _ in COMMANDS if len(words) > 1})])
def test_help_of_every_group_lists_its_commands(group):
    shown = CliRunner().invoke(app, [*group.split(), "--help"])
    assert shown.exit_code == 0
    names = {words[len(group.split())] for words, _ in COMMANDS if not group or words[0] == group}
    assert all(name in shown.output for name in names)
