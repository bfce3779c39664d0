"""What every file that travels next to the weights must and must not do."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_imports

import emma_hf
from emma_hf.configuration_emma import AUTO_MAP, HUB_FILES

SOURCE = Path(emma_hf.__file__).parent
ALLOWED = {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
GUARDED = {"bitsandbytes", "ftfy", "regex", "triton"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "open", "__import__"}
FORBIDDEN_MODULES = {"pickle", "socket", "subprocess", "urllib", "http", "requests", "importlib", "ctypes"}


def imports_of(tree: ast.AST) -> list[tuple[ast.stmt, str, bool]]:
    """Every import, its top-level module, and whether it stands in a `try`."""
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.split(".")[0], id(node) in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node, node.module.split(".")[0], id(node) in guarded))
    return found


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_hub_file_is_flat_and_imports_nothing_else(name):
    path = SOURCE / name
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for _, module, guarded in imports_of(tree):
        assert module in ALLOWED or (module in GUARDED and guarded), module
        assert module not in FORBIDDEN_MODULES, module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None
            assert f"{node.module}.py" in HUB_FILES, node.module
    # What Transformers finds by its regular expressions, docstrings included, are files that travel.
    assert {f"{Path(found).stem}.py" for found in get_relative_imports(path)} <= set(HUB_FILES)
    check_imports(path)


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_hub_file_runs_nothing_and_opens_nothing(name):
    for node in ast.walk(ast.parse((SOURCE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"


def test_the_auto_map_names_what_is_there():
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"{module}.py" in HUB_FILES
        assert f"class {name}(" in (SOURCE / f"{module}.py").read_text(encoding="utf-8")


def test_every_file_of_the_closure_is_listed():
    for name in HUB_FILES:
        assert (SOURCE / name).is_file(), name
