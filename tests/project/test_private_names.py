"""Private names of other packages stand in `compat_emma.py`, and elsewhere only where this table says why."""

import ast
from pathlib import Path

import pytest

import emma_hf

SOURCE = Path(emma_hf.__file__).parent
# The file that exists for what differs between versions.
EXEMPT = "model/compat_emma.py"
MODEL = "a model tells `PreTrainedModel` in class attributes of these names what it can do"
VLLM = "vLLM's multimodal processor has no public place for what it passes to ours"
# (file, name): why no public name does.
ALLOWED = {
    ("model/fusion_emma.py", "_backward_hooks"): "torch has no public question for whether a module has hooks",
    ("model/fusion_emma.py", "_backward_pre_hooks"): "likewise",
    ("model/fusion_emma.py", "_forward_hooks"): "likewise",
    ("model/fusion_emma.py", "_forward_pre_hooks"): "likewise",
    (
        "model/modeling_emma.py",
        "_assert_async",
    ): "torch's only check of a tensor's values that stays in a compiled graph",
    ("model/configuration_emma.py", "_dict_from_json_file"): "reads the file as the base class does",
    ("model/fused_alignment.py", "_current_level"): "PyTorch has no public question for forward-mode derivatives",
    ("model/modeling_emma.py", "_can_compile_fullgraph"): MODEL,
    (
        "model/modeling_emma.py",
        "_expand_inputs_for_generation",
    ): "`generate` repeats rows here, and pictures are no rows",
    ("model/modeling_emma.py", "_from_config"): "builds a tower with the attention that its config asks for",
    ("model/modeling_emma.py", "_init_weights"): "where Transformers asks a model to initialize a module",
    ("model/modeling_emma.py", "_keys_to_ignore_on_load_unexpected"): MODEL,
    ("model/modeling_emma.py", "_no_split_modules"): MODEL,
    ("model/modeling_emma.py", "_skip_keys_device_placement"): MODEL,
    ("model/modeling_emma.py", "_supports_attention_backend"): MODEL,
    ("model/modeling_emma.py", "_supports_flash_attn"): MODEL,
    ("model/modeling_emma.py", "_supports_flex_attn"): MODEL,
    ("model/modeling_emma.py", "_supports_sdpa"): MODEL,
    ("model/modeling_emma.py", "_tp_plan"): MODEL,
    ("model/processing_emma.py", "_get_arguments_from_pretrained"): "where 4.57 loads a processor's parts",
    ("model/processing_emma.py", "_get_num_multimodal_tokens"): "what vLLM asks a processor for",
    (
        "model/processing_emma.py",
        "_merge_kwargs",
    ): "sorts a processor's keywords, flat and nested, as every processor does",
    ("model/quantization_emma.py", "_convert_weight_packed_for_cpu_inverse"): "bitsandbytes has no public inverse",
    (
        "model/quantization_emma.py",
        "_parameters",
    ): "the packed weight, which the public name hides behind the exact one",
    ("serving/server.py", "_build_chunk_sse"): "Transformers' server is made of private methods",
    ("serving/server.py", "_build_completion"): "likewise",
    ("tiny/recipe.py", "_get_train_sampler"): "where `Trainer` asks for the order of rows",
    ("training/trainer.py", "_get_train_sampler"): "likewise",
    (
        "training/trainer.py",
        "_is_accelerate_prepared",
    ): "an evaluation leaves it, and then no DDP is put around the model",
    ("integrations/liger.py", "_patch_rms_norm_module"): "Liger's public functions replace the norms of every model",
    ("integrations/liger.py", "_patch_swiglu_module"): "likewise, the MLPs",
    ("integrations/vllm_model.py", "_apply_hf_processor_main"): VLLM,
    (
        "integrations/vllm_model.py",
        "_create_hf_to_vllm_mapper",
    ): "where vLLM renames the weights of a Transformers model",
    ("integrations/vllm_model.py", "_finalize_hf_mm_data"): VLLM,
    ("integrations/vllm_model.py", "_get_cache_missing_processor_kwargs"): VLLM,
    ("integrations/vllm_model.py", "_get_hf_mm_inputs"): VLLM,
}
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def attributes_of(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every private attribute that is read or set, by a dot or by its name, and whether `super()` is asked for it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            found.append((node.attr, of_super))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = getattr(node.args[1], "value", None)
            if is_private(name):
                found.append((name, False))
    return found


def members_of(tree: ast.AST) -> set[str]:
    """Private methods and attributes that the bodies of classes define."""
    found = set()
    for outer in ast.walk(tree):
        for node in outer.body if isinstance(outer, ast.ClassDef) else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return set(filter(is_private, found))


def set_on_self(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def foreign_names(texts: dict[str, str]) -> set[tuple[str, str]]:
    """(file, name) of every private name that belongs to another package, as far as the texts tell.

    It is imported, or asked of `super()`, or used on an object although no class of ours defines it, or defined by a
    class although its file never uses it, which is an override.
    """
    trees = {file: ast.parse(text) for file, text in texts.items()}
    ours = set().union(*(members_of(tree) | set_on_self(tree) for tree in trees.values()))
    found = set()
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                names = [getattr(node, "module", ""), *(alias.name for alias in node.names)]
                found |= {(file, part) for name in names for part in name.split(".") if is_private(part)}
        used = attributes_of(tree)
        found |= {(file, name) for name, of_super in used if of_super or name not in ours}
        found |= {(file, name) for name in members_of(tree) - {name for name, of_super in used if not of_super}}
    return found


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


@pytest.fixture(scope="module")
def names(texts) -> set[tuple[str, str]]:
    return foreign_names(texts)


def test_private_names_of_others_are_those_of_the_table(names):
    found = {(file, name) for file, name in names if file != EXEMPT}
    assert found - set(ALLOWED) == set(), f"Use a public name, or `{EXEMPT}`, or say in the table why neither does."
    assert set(ALLOWED) - found == set(), "These are gone: take them out of the table."


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.modeling_attn_mask_utils import _prepare_4d_attention_mask",
        "import transformers._version",
        "from transformers._version import version",
        "def added(config): return transformers.cache_utils._static",
        "def added(config): return config._attn_implementation",
        "def added(config): config._attn_implementation = 'eager'",
        "def added(config): return getattr(config, '_attn_implementation', None)",
        "class Added(EmmaModel):\n    def _reorder_cache(self): return None",
        "class Added(EmmaModel):\n    _is_stateful = True",
        "class Added(EmmaModel):\n    def forward(self): return super()._validate_model_kwargs({})",
    ],
)
def test_a_private_name_of_others_is_found(texts, names, line):
    added = foreign_names({**texts, "added.py": line}) - names
    assert [file for file, _ in added] == ["added.py"]


def test_private_names_of_our_own_are_not_found(texts, names):
    line = "def added(processor): return processor._truncate"
    assert foreign_names({**texts, "added.py": line}) == names
