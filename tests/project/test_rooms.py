"""The layout of the package: what each folder may import, and what a file may be called."""

import ast
from pathlib import Path

import pytest

import emma_hf
from emma_hf.model.code_files_emma import HUB_FILES

PACKAGE = Path(emma_hf.__file__).parent
# Imports go down only: a room imports itself and rooms on lines above its own.
LEVELS = (
    ("model",),
    ("storage",),
    ("conversion", "inference", "data", "serving"),
    ("integrations",),
    ("training",),
    ("evaluation",),
    ("analysis",),
    ("tiny",),
    ("hub",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# What any room may take from the package itself.
ROOT_NAMES = {"EMMA_TINY", "__version__", "auto_classes"}
# Copied to the Hub alone, or run in a process that cannot import the package.
ALONE = {"hub/template/handler.py", "hub/answer_without_package.py"}


def sources() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def imports_of(name: str, text: str) -> list[tuple[str, str]]:
    """Each import of the package's own in a file: the room it comes from (empty for the package itself), and the name."""
    found = []
    depth = name.count("/")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [
                (alias.name.split(".")[1:2] or [""], alias.name)
                for alias in node.names
                if alias.name.split(".")[0] == "emma_hf"
            ]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                above = name.split("/")[: depth - node.level + 1]
                parts = above + parts
            elif parts[:1] == ["emma_hf"]:
                parts = parts[1:]
            else:
                continue
            found += [(parts[:1] or [""], alias.name) for alias in node.names]
    return [(room[0], imported) for room, imported in found]


def offences(name: str, text: str) -> list[str]:
    """What a file must not import, as sentences."""
    if name in ALONE:
        return [f"imports {imported}, but is run alone" for _, imported in imports_of(name, text)]
    own = name.split("/")[0] if "/" in name else ""
    wrong = []
    for room, imported in imports_of(name, text):
        if not own:
            if room not in ("model", "cli", "auto_classes", ""):
                wrong.append(f"imports {imported} of {room}, which must not be loaded with the package")
        elif not room:
            if imported not in ROOT_NAMES:
                wrong.append(f"imports {imported} of the package, whose rooms import each other")
        elif room != own and LEVEL[room] >= LEVEL[own]:
            wrong.append(f"imports {imported} of {room}, which is not below {own}")
    return wrong


def test_every_room_has_a_level():
    rooms = {name.split("/")[0] for name in sources() if "/" in name}
    assert rooms == {room for room in LEVEL if (PACKAGE / room).is_dir()}


@pytest.mark.parametrize("name", sources())
def test_imports_go_down_only(name):
    assert not offences(name, (PACKAGE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model/modeling_emma.py", "from ..storage.folders import new_folder"),
        ("data/datasets.py", "from ..training import prepare"),
        ("serving/server.py", "from ..inference import load_model"),
        ("training/trainer.py", "from emma_hf.hub import export"),
        ("hub/upload.py", "import emma_hf.cli"),
        ("tiny/scenes.py", "from .. import EmmaConfig"),
        ("__init__.py", "from .training import prepare"),
        ("hub/template/handler.py", "from emma_hf import EmmaConfig"),
    ],
)
def test_an_import_that_goes_up_is_found(name, line):
    assert offences(name, line)


def test_the_hub_files_are_the_folder_of_the_model():
    assert set(HUB_FILES) == {name.split("/")[1] for name in sources() if name.startswith("model/")} - {"__init__.py"}


def test_no_file_has_the_name_of_what_it_defines():
    """`from .convert import convert` would hide the module."""
    for name in sources():
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert Path(name).stem not in defined - {"main"}, name
