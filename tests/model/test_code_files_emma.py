"""What every file that travels next to the weights must and must not do."""

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_imports

import emma_hf
from emma_hf.model.code_files_emma import AUTO_MAP, HUB_FILES

PACKAGE = Path(emma_hf.__file__).parent
SHIPPED = (*HUB_FILES, "handler.py")
LIBRARIES = {"torch", "transformers", "safetensors", "numpy", "PIL"}
GUARDED = {"bitsandbytes", "ftfy", "regex", "triton"}
# Of the standard library only what a file was seen to need; what opens connections, runs programs or unpickles is not.
STANDARD = {
    "base64", "binascii", "bisect", "collections", "contextlib", "copy", "dataclasses", "difflib", "functools", "html", "inspect",
    "io", "itertools", "json", "logging", "math", "os", "pathlib", "re", "shutil", "sys", "typing", "unicodedata", "warnings",
}  # fmt: skip
# Of modules that can do more, the names that may be used.
NAMES = {
    "os": {"PathLike", "fspath", "path", "path.dirname", "path.abspath"},
    "shutil": {"copyfile"},
    "io": {"BytesIO"},
    "sys": {"modules"},
}
# Names that run what a text says, load code or objects from files, or reach the network, wherever they stand.
FORBIDDEN = {
    "__import__", "__builtins__", "__subclasses__", "__globals__", "globals", "import_module",
    "get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file", "pickle", "cloudpickle", "joblib",
    "hf_hub_download", "snapshot_download", "cached_file", "load_library", "cpp_extension", "load_state_dict_from_url",
    "system", "popen", "spawn", "urlopen", "requests", "httpx", "socket", "subprocess", "custom_generate",
}  # fmt: skip
# Calls that touch files, code or addresses, and the places where they are meant: each is reached only from
# `save_pretrained`, from `from_pretrained`, or from a picture that the caller names.
TOUCHING = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename", "rmtree", "touch",
    "symlink_to", "copyfile", "copytree", "move", "rmdir", "load", "load_file", "save", "save_file", "load_image", "compile", "hub",
    "from_file", "glob", "iterdir", "walk", "listdir", "remove", "makedirs",
}  # fmt: skip
MEANT = {
    ("code_files_emma.py", "copy_code_files", "copyfile"),
    ("code_files_emma.py", "copy_code_files", "mkdir"),
    ("handler.py", "_load_image", "load"),
    ("handler.py", "_open_image", "open"),
    ("image_processing_emma.py", "_open", "load"),
    ("image_processing_emma.py", "_open", "load_image"),
    ("image_processing_emma.py", "_open", "open"),
    ("image_processing_emma.py", "_to_rgb", "load"),
    ("compat_emma.py", "make_tokenizer_config_portable", "read_text"),
    ("compat_emma.py", "make_tokenizer_config_portable", "write_text"),
    ("processing_emma.py", "save_pretrained", "write_text"),
}
# Where an attribute's name is no literal: it comes from a constant of the same file.
COMPUTED_NAMES = {("quantization_emma.py", "add_modules_to_skip")}
# Who loads another part, all of them from the place that the caller named.
LOADING = {
    ("modeling_emma.py", "from_pretrained"),
    ("processing_emma.py", "from_pretrained"),
    ("processing_emma.py", "_get_arguments_from_pretrained"),
}
# Methods of models and patterns have these names, too, so only the bare functions are meant.
BUILT_IN = {"eval", "exec", "compile", "open"}


def source_of(name: str) -> Path:
    """Where a file that travels lies in the package."""
    return PACKAGE / ("hub/template" if name == "handler.py" else "model") / name


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


def functions_of(tree: ast.AST) -> dict[int, str]:
    """The innermost function or method around each node, by the node's id; empty at the top of the file."""
    names: dict[int, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        names[id(node)] = name
        inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else name
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, "")
    return names


def offences(name: str, text: str) -> set[str]:
    """What a file that travels must not do, as sentences; none for a file that may travel."""
    tree = ast.parse(text)
    where = functions_of(tree)
    found = set()
    for _, module, guarded in imports_of(tree):
        if module not in LIBRARIES | STANDARD and not (module in GUARDED and guarded):
            found.add(f"imports {module}")
    for node in ast.walk(tree):
        line, function = getattr(node, "lineno", 0), where[id(node)]
        if isinstance(node, ast.ImportFrom):
            found |= offences_of_import(node)
        used = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if used in FORBIDDEN or (isinstance(node, ast.Name) and used in BUILT_IN):
            found.add(f"line {line} uses {used}")
        if used in TOUCHING and (name, function, used) not in MEANT and not is_harmless(node):
            found.add(f"line {line}, {function or 'top'} uses {used}")
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            module, _, rest = dotted.partition(".")
            if module in NAMES and rest and rest not in NAMES[module]:
                found.add(f"line {line} uses {dotted}")
        if isinstance(node, ast.Call):
            found |= offences_of_call(name, node, function)
    return found


def offences_of_import(node: ast.ImportFrom) -> set[str]:
    found = set()
    if node.level and (node.level > 1 or f"{node.module}.py" not in HUB_FILES):
        found.add(f"imports from {node.module}")
    for alias in node.names:
        if alias.name in FORBIDDEN | TOUCHING - {"load_image"} or alias.name == "*":
            found.add(f"line {node.lineno} imports {alias.name}")
        if node.module in NAMES and alias.name not in NAMES[node.module]:
            found.add(f"line {node.lineno} imports {alias.name} of {node.module}")
    return found


def is_harmless(node: ast.AST) -> bool:
    """Compiling a regular expression, or reading a tensor inside a Triton kernel."""
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("re.compile", "regex.compile", "tl.load")


def offences_of_call(name: str, call: ast.Call, function: str) -> set[str]:
    called = ast.unparse(call.func)
    found = set()
    by_name = called in ("getattr", "setattr", "delattr") and not isinstance(call.args[1], ast.Constant)
    if by_name and (name, function) not in COMPUTED_NAMES:
        found.add(f"line {call.lineno}: {called} by a name that is computed")
    for keyword in call.keywords:
        if keyword.arg == "trust_remote_code" and not is_false(keyword.value):
            found.add(f"line {call.lineno} trusts remote code")
    if called.endswith(".from_pretrained") and name != "handler.py" and (name, function) not in LOADING:
        found.add(f"line {call.lineno}, {function} loads {called}")
    return found


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_hub_file_is_flat(name):
    path = source_of(name)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None
            assert f"{node.module}.py" in HUB_FILES, node.module
    # What Transformers finds by its regular expressions, docstrings included, are files that travel.
    assert {f"{Path(found).stem}.py" for found in get_relative_imports(path)} <= set(HUB_FILES)
    check_imports(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_travels_runs_opens_and_imports_nothing_else(name):
    assert not offences(name, source_of(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "import socket",
        "import requests",
        "import ftfy",
        "from importlib import import_module",
        "from os import system",
        "from io import open",
        "from pathlib import *",
        "from .cli import main",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "eval(config.projector_hidden_act)",
        "exec(config.code)",
        "compile(config.code, '', 'exec')",
        "__import__(config.module)",
        "open(config.path)",
        "Path(config.path).read_text()",
        "torch.load(config.path)",
        "torch.hub.load(config.repo, config.name)",
        "torch.compile(self)",
        "torch.ops.load_library(config.path)",
        "torch.utils.cpp_extension.load(config.path)",
        "os.system(config.command)",
        "os.environ['HOME']",
        "shutil.rmtree(config.path)",
        "getattr(torch, config.function)()",
        "AutoModel.from_pretrained(config.name, trust_remote_code=True)",
        "AutoModel.from_config(config, trust_remote_code=config.trust)",
        "AutoTokenizer.from_pretrained(config.name)",
        "().__class__.__base__.__subclasses__()",
    ],
)
def test_a_line_that_should_not_travel_is_found(line):
    text = source_of("modeling_emma.py").read_text(encoding="utf-8")
    assert not offences("modeling_emma.py", text)
    added = line if line.endswith("*") else f"def added(self, config):\n    {line}"
    assert offences("modeling_emma.py", f"{text}\n\n{added}\n")


def test_the_auto_map_names_what_is_there():
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"{module}.py" in HUB_FILES
        assert f"class {name}(" in source_of(f"{module}.py").read_text(encoding="utf-8")


def test_every_file_of_the_closure_is_listed():
    for name in HUB_FILES:
        assert source_of(name).is_file(), name
