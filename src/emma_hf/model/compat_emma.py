"""What depends on the version of Transformers, all of it; each entry says with which version it goes.

The package runs on Transformers 4.57 and 5.x. Everything else in it is written as if there were one version.
"""

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .errors_emma import EmmaError

# `pyproject.toml` says the same to pip, and the Makefile names the versions that the tests run on. A minor version: its
# patch releases count as tested.
NEWEST_TESTED_TRANSFORMERS = "5.24"
# Of each major version.
OLDEST_TESTED_TRANSFORMERS = {4: "4.57.6", 5: "5.16.1"}
# Language models whose scaled rotary embeddings 4.57 ignores, or wants in another form.
UNSCALED_BEFORE_5 = ("nemotron", "olmo", "olmo2", "phi3", "phi4_multimodal")


def untested_warning(version: str) -> str | None:
    """What a user of this version of Transformers should know and do, or `None` where EMMA is tested on it."""

    def numbers(version: str) -> tuple[int, ...]:
        # (5, 25, 0) of `5.25.0.dev0`.
        return tuple(map(int, re.findall(r"\d+", version)[:3]))

    release, newest = numbers(version), NEWEST_TESTED_TRANSFORMERS
    oldest = OLDEST_TESTED_TRANSFORMERS[min(max(release[0], 4), 5)]
    if release[:2] > numbers(newest):
        reason = f"newer than {newest}, the newest"
        remedy = (
            "Update EMMA (`pip install --upgrade emma-hf`; with `trust_remote_code`, load the newest revision of the "
            f'model), or `pip install "transformers=={newest}.*"`. If EMMA is up to date and fails, tell its authors.'
        )
    elif release < numbers(oldest):
        reason = f"older than {oldest}, the oldest {oldest[0]}.x"
        remedy = f'Update Transformers: `pip install "transformers=={newest}.*"`.'
    else:
        return None
    known = f"This is Transformers {version}, which is {reason} that EMMA is tested on"
    return f"{known}: it may fail or answer wrongly. {remedy}"


# The code files in a Hub folder come without pip's limits. Several copies of this file in one process (the package's,
# and one for each folder) warn once.
if _warning := untested_warning(transformers.__version__):
    logging.get_logger("transformers.emma").warning_once(_warning)

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

# What models, `generate` and their outputs call the cache: `cache` since 5.24. Goes with 5.23.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

# Weight names of the two towers that Transformers 4.57 nests one level deeper. Files on disk keep the deeper name, the
# one that both versions load. Goes with 4.57.
NESTED_TOWERS = {"vision_tower": "vision_model", "instruction_encoder": "text_model"}

# Tensor-parallel plan of the head, renamed in 5. Goes with 4.57.
HEAD_TP_PLAN = {"lm_head": "colwise_gather_output" if TRANSFORMERS_5 else "colwise_rep"}

# Language models with a cache that `generate` makes for their own classes alone. Goes with 4.57.
OWN_CACHE = (
    frozenset()
    if TRANSFORMERS_5
    else frozenset(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "qwen3_next", "zamba", "zamba2"))
)

# Keyword of `TrainingArguments` that takes the warm-up as a share of all steps. Goes with 4.57.
WARMUP_SHARE = "warmup_steps" if TRANSFORMERS_5 else "warmup_ratio"


def image_text_auto_classes() -> dict[str, Any]:
    """The Auto classes of this version for models that read images and write text, by name. Goes with 4.57."""
    classes = {
        "AutoModelForImageTextToText": transformers.AutoModelForImageTextToText,
        "AutoModelForMultimodalLM": getattr(transformers, "AutoModelForMultimodalLM", None),
        "AutoModelForVision2Seq": getattr(transformers, "AutoModelForVision2Seq", None),
    }
    return {name: auto_class for name, auto_class in classes.items() if auto_class is not None}


def ties_word_embeddings(config: Any) -> bool:
    """Whether a language model's head shares the weight of its embedding; not every config of 5.x says so."""
    return bool(getattr(config, "tie_word_embeddings", False))


def silence_padding_advice(tokenizer: Any) -> None:
    """Keep 4.57 from advising against padding as a step of its own. Goes with 4.57."""
    if not TRANSFORMERS_5:
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True


def tied_weights_keys(embedding: str) -> dict[str, str] | list[str]:
    """`_tied_weights_keys` of a head that shares the weight named `embedding`.

    Transformers 5 maps tied weights to their source, 4.57 lists them. Goes with 4.57.
    """
    return {"lm_head.weight": embedding} if TRANSFORMERS_5 else ["lm_head.weight"]


def text_config_from_dict(values: dict[str, Any]) -> dict[str, Any]:
    """Language model config values as this version reads them.

    Transformers 5 stores the rotary base inside `rope_parameters`, a key that 4.57 keeps without using: the model would
    run with the default base. Goes with 4.57.

    Raises:
        EmmaError: rotary values that 4.57 has no names for.
    """
    values = dict(values)
    rope = values.get("rope_parameters")
    if TRANSFORMERS_5 or not rope:
        return values
    rope = dict(values.pop("rope_parameters"))
    if any(isinstance(each, dict) for each in rope.values()):
        rope = _rope_of_full_attention(values, rope)
    theta = rope.pop("rope_theta", 10000.0)
    share = rope.pop("partial_rotary_factor", None)
    if values.get("model_type") in ("gpt_neox", "gpt_neox_japanese"):
        values.setdefault("rotary_emb_base", theta)
        values |= {} if share is None else {"rotary_pct": share}
    elif share is not None:
        values.setdefault("partial_rotary_factor", share)
    values.setdefault("rope_theta", theta)
    if rope.get("rope_type", "default") == "default":
        # Some models are scaled by default.
        values.setdefault("rope_scaling", None)
    elif values.get("model_type") in UNSCALED_BEFORE_5:
        raise EmmaError(
            f"Transformers 4.57 does not scale the rotary embeddings of {values['model_type']!r} so: got "
            f"`rope_parameters` {rope}. Use Transformers 5."
        )
    else:
        values.setdefault("rope_scaling", rope)
    return values


def push_saved(saved: Any, folder: str | os.PathLike, options: dict[str, Any]) -> Any:
    """What `save_pretrained(push_to_hub=True)` does after `saved` has been written into `folder`.

    4.57 takes a folder of the repository's name in the working directory, where there is one, and pushes no more of it
    than what changes at its top. The default goes with 4.57.
    """
    if not TRANSFORMERS_5:
        options.setdefault("use_temp_dir", True)
    return saved.push_to_hub(options.pop("repo_id", Path(folder).name), **options)


def _rope_of_full_attention(values: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary values of layers with full attention; those of sliding windows go into `values`, or are the same."""
    full, sliding = dict(rope.get("full_attention") or {}), dict(rope.get("sliding_attention") or {})
    theta = sliding.pop("rope_theta", full.get("rope_theta"))
    is_known = (
        rope.keys() <= {"full_attention", "sliding_attention"} and sliding.get("rope_type", "default") == "default"
    )
    if values.get("model_type") == "gemma3_text":
        values.setdefault("rope_local_base_freq", theta)
    elif theta != full.get("rope_theta"):
        is_known = False
    if not is_known:
        raise EmmaError(
            f"Transformers 4.57 has no such rotary embeddings for {values.get('model_type')!r}: got `rope_parameters` "
            f"{rope}. Use Transformers 5."
        )
    return full


def unwrap_clip_model(tower: nn.Module) -> nn.Module:
    """The module that holds a CLIP tower's embeddings and layers: one level down in 4.57. Goes with 4.57."""
    return getattr(tower, "vision_model", None) or getattr(tower, "text_model", None) or tower


def clip_layer(layer: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """Run one CLIP encoder layer on `hidden_states` (batch, tokens, width). Goes with 4.57.

    4.57 takes the causal mask as an argument of its own and returns a tuple.
    """
    if TRANSFORMERS_5:
        return layer(hidden_states, attention_mask=mask, **({"is_causal": True} if causal else {}))
    return layer(hidden_states, attention_mask=None, causal_attention_mask=mask)[0]


def clip_causal_mask(config: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Causal mask of CLIP's text encoder for embeddings (batch, tokens, width), as its own forward makes it.

    Goes with 4.57.
    """
    if TRANSFORMERS_5:
        from transformers.masking_utils import create_causal_mask

        # By position: the cache's name is not the same in every 5.x.
        return create_causal_mask(config, hidden_states, None, None)
    if config._attn_implementation == "flex_attention":
        # CLIP of 4.57 would hand it the tensor below, with which it crashes the process.
        from transformers.masking_utils import create_causal_mask

        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return create_causal_mask(config, hidden_states, None, places, None)
    # Not by Transformers' own function, which cannot make the mask in float64.
    batch, tokens = hidden_states.shape[:2]
    lowest = hidden_states.new_full((tokens, tokens), torch.finfo(hidden_states.dtype).min)
    return lowest.triu(1).expand(batch, 1, tokens, tokens)


def register_tower_names(**inner: str) -> None:
    """Let Transformers 5 read both spellings of the towers' weight names, as it does for CLIP's own classes.

    Args:
        inner: class name of a tower, and the module of 4.57 that its names on disk go through. Goes with 4.57.
    """
    if not TRANSFORMERS_5:
        return
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    for class_name, module in inner.items():
        # A second copy of this file, from the Hub, says the same.
        register_checkpoint_conversion_mapping(class_name, [PrefixChange(prefix_to_remove=module)], overwrite=True)


def tower_key_mapping() -> dict[str, str] | None:
    """`key_mapping` with which 4.57 reads a checkpoint whose towers carry the flat names of 5. Goes with 4.57."""
    if TRANSFORMERS_5:
        return None
    return {rf"^((?:model\.)?{tower})\.(?!{inner}\.)": rf"\1.{inner}." for tower, inner in NESTED_TOWERS.items()}


def keep_nested_names_on_save(model: nn.Module) -> None:
    """Make `save_pretrained` of Transformers 5 write the towers under their 4.57 names. Goes with 4.57.

    5.x remembers how a checkpoint was renamed on loading and undoes it on saving; a model that was not loaded, or was
    loaded from flat names, has nothing to undo, so the rule is put there.
    """
    if not TRANSFORMERS_5:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    # As for a model that was not loaded: the language model's own rules, without those that only loading needed.
    rules = [
        rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, PrefixChange)
    ]
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    for tower, inner in NESTED_TOWERS.items():
        rule = PrefixChange(prefix_to_remove=inner)
        rule.scope_prefix, rule.base_model_prefix = f"{prefix}{tower}", ""
        rules.append(rule)
    model._weight_conversions = rules


@contextmanager
def only_primary_attributes(processor: Any) -> Iterator[None]:
    """Keep `save_pretrained` of 4.57 from writing the second tokenizer over the first. Goes with 4.57."""
    if TRANSFORMERS_5:
        yield
        return
    processor.attributes = ["image_processor", "tokenizer"]
    try:
        yield
    finally:
        del processor.attributes


def chat_template_kwargs(kwargs: dict[str, Any], **for_processor: Any) -> dict[str, Any]:
    """Keywords of `apply_chat_template`, with those for the processor where this version expects them. Goes with 4.57.

    5 takes them in `processor_kwargs`; 4.57 takes them flat and drops that dictionary without a word.
    """
    inner = {**(kwargs.get("processor_kwargs") or {}), **for_processor}
    if TRANSFORMERS_5:
        return {**kwargs, "processor_kwargs": inner}
    return {**{name: value for name, value in kwargs.items() if name != "processor_kwargs"}, **inner}


def warn_of_too_long_prompt(tokenizer: Any, ids: list[int], max_length: int | None, verbose: bool) -> None:
    """Warn, as Transformers' tokenizers do and once for each, of more ids than `tokenizer.model_max_length`."""
    tokenizer._eventual_warn_about_too_long_sequence(ids, max_length, verbose)


def is_left_unquantized(name: str, skipped: list[str]) -> bool:
    """Whether bitsandbytes leaves the linear layer `name` alone, as this version matches the list `skipped`.

    4.57 finds an entry anywhere before the layer's own name, and that name itself. 5 finds it at the path's start, as a
    regular expression, or at its end. Goes with 4.57.
    """
    if TRANSFORMERS_5:
        from transformers.quantizers.quantizers_utils import should_convert_module

        return not should_convert_module(name, skipped)
    own = name.rpartition(".")[2]
    return any(own == entry or f"{entry}." in name or entry == name for entry in skipped)


def pass_keywords_in_pipelines(processor_class: type) -> None:
    """Let the pipeline of 4.57 hand its keywords to a processor of this class where it is given messages.

    5 does; 4.57 drops them without a word, `instructions` among them. Goes with 4.57.
    """
    if TRANSFORMERS_5:
        return
    from transformers.pipelines.image_text_to_text import Chat, ImageTextToTextPipeline

    original = ImageTextToTextPipeline.preprocess

    @wraps(original)
    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, **keywords):
        if not (keywords and isinstance(inputs, Chat) and isinstance(self.processor, processor_class)):
            return original(self, inputs, timeout, continue_final_message, **keywords)
        if continue_final_message is None:
            continue_final_message = inputs.messages[-1]["role"] == "assistant"
        model_inputs = self.processor.apply_chat_template(
            inputs.messages,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            return_tensors=self.framework,
            tokenize=True,
            return_dict=True,
            **keywords,
        )
        model_inputs["text"] = inputs
        return model_inputs

    ImageTextToTextPipeline.preprocess = preprocess


def nested_tower_name(name: str) -> str:
    """A weight name as it is on disk, for a name of either version. Goes with 4.57."""
    for tower, inner in NESTED_TOWERS.items():
        name = re.sub(rf"^((?:model\.)?{tower})\.(?!{inner}\.)", rf"\1.{inner}.", name)
    return name


def make_tokenizer_config_portable(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer's config so that both supported Transformers versions read the same tokenizer from it.

    5.x drops `legacy` and `add_bos_token`, without which a Llama tokenizer is read as another one, and lists its extra
    tokens under a name that 4.57 expects to hold a dictionary.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    legacy = tokenizer.init_kwargs.get("legacy", vars(tokenizer).get("legacy"))
    if legacy is not None:
        # Not what the attributes say, which 5.x does not keep up with the file, but what is done.
        ids = tokenizer("a")["input_ids"]
        config["legacy"] = legacy
        config["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        config["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("auto_map", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
