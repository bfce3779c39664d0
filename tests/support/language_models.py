"""Every causal language model of Transformers, small, beside an EMMA that is built around it."""

import copy
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from support.models import tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from emma_hf import EmmaConfig, EmmaForConditionalGeneration
from emma_hf.model.errors_emma import EmmaError
from emma_hf.model.language_models_emma import refusal

PAGE = Path(__file__).parents[2] / "docs" / "language-models.md"
MODEL_TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "emma")
VOCABULARY = 128
# Sizes by the names that configs have for them; each config takes those that it knows.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads"), 4
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "n_inner", "ffn_hidden_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "qk_head_dim": 32,
    "vocab_size": VOCABULARY,
}
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
# What a model wants beside these: sizes that its config leaves open, or that depend on each other.
OWN_SIZES: dict[str, dict] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": EXPERTS,
    "dots1": {**EXPERTS, "n_shared_experts": 1, "n_routed_experts": 4, "num_key_value_heads": 4, "head_dim": 16},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"num_attention_heads": 4, "num_key_value_heads": 2, "kv_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": HEAD,
    "mimo_v2_flash": {"num_attention_heads": 16},
    "nemotron": {**HEAD, "num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
    },
    "phi4_multimodal": {"vision_config": {"num_hidden_layers": 2}, "audio_config": {"num_blocks": 1}},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Verdict:
    """What became of a model type: `accepted`, `refused`, `wrong` or `not built`, and why."""

    kind: str
    reason: str = ""


def small_config(model_type: str):
    """Config of `model_type` with a width of 64 and two layers, of two kinds where it has them."""
    config_class, own = CONFIG_MAPPING[model_type], OWN_SIZES.get(model_type, {})
    standard = config_class()
    values = standard.to_dict()
    changed = {name: size for name, size in SIZES.items() if isinstance(values.get(name), int)}
    kinds = values.get("layer_types") or []
    second = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), 1)
    for name, value in values.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = 2
        elif isinstance(value, list) and len(value) == getattr(standard, "num_hidden_layers", None):
            changed[name] = [value[0], value[second]]
    return config_class(**{**changed, **own})


def verdict(model_type: str) -> Verdict:
    """Whether EMMA computes what the causal language model of `model_type` computes."""
    try:
        config = small_config(model_type)
    except Exception as error:
        return _refused_by_default(model_type) or Verdict("not built", _message(error))
    return verdict_of(config)


def verdict_of(config) -> Verdict:
    """As `verdict`, for a config."""
    try:
        emma_config(config)
    except EmmaError:
        return Verdict("refused", refusal(config))
    try:
        reference = random_reference(config)
        expected = answers(reference)
    except Exception as error:
        return Verdict("not built", _message(error))
    try:
        difference = compare(reference, config, expected)
    except Exception as error:
        return Verdict("wrong", _message(error))
    return Verdict("wrong", difference) if difference else Verdict("accepted")


def emma_config(text_config) -> EmmaConfig:
    values = tiny_config().to_dict()
    parts = {name: values[name] for name in ("vision_config", "instruction_config")}
    return EmmaConfig(**parts, text_config=copy.deepcopy(text_config))


def random_reference(config):
    """`AutoModelForCausalLM` of `config` with random weights everywhere, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompt() -> dict[str, torch.Tensor]:
    """Two rows, the second of them padded on the left."""
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6])}


def answers(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt (tokens, vocabulary), and the tokens that follow it."""
    with torch.no_grad():
        logits = model(**prompt()).logits[prompt()["attention_mask"].bool()]
    # EMMA never generates its placeholder, the last token.
    tokens = model.generate(
        **prompt(), max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=[VOCABULARY - 1]
    )
    return logits, tokens


def compare(reference, config, expected: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """How EMMA with the weights of `reference` differs from it, or None."""
    emma = EmmaForConditionalGeneration(emma_config(config)).eval()
    decoder = emma.model.language_model
    source = next((part for part in reference.modules() if type(part) is type(decoder)), None)
    if source is None:
        return f"{type(reference).__name__} has no {type(decoder).__name__}"
    if _is_tied(emma) != _is_tied(reference):
        return "the head is tied in one of them"
    decoder.load_state_dict(source.state_dict())
    with torch.no_grad():
        emma.lm_head.weight.copy_(reference.get_output_embeddings().weight)
    for name, one, other in zip(("logits", "tokens"), expected, answers(emma)):
        if one.shape != other.shape or not torch.allclose(one, other, atol=1e-4, rtol=1e-4):
            return f"{name} differ"
    return _compare_with_image(reference, emma)


def _is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _compare_with_image(reference, emma) -> str | None:
    generator = torch.Generator().manual_seed(1)
    size, config = emma.config.vision_config.image_size, emma.config
    pixels = torch.randn(2, 3, size, size, generator=generator)
    instruction = torch.randint(0, 99, (2, config.instruction_length), generator=generator)
    text = prompt()["input_ids"]
    ids = torch.cat([text[:, :4], torch.full((2, config.image_seq_length), config.image_token_index), text[:, 4:]], 1)
    with torch.no_grad():
        logits = emma(input_ids=ids, pixel_values=pixels, instruction_input_ids=instruction).logits
        embeddings = reference.get_input_embeddings()(ids)
        embeddings[:, 4 : 4 + config.image_seq_length] = emma.get_image_features(pixels, instruction).pooler_output
        expected = reference(inputs_embeds=embeddings).logits
    return None if torch.allclose(logits, expected, atol=1e-4, rtol=1e-4) else "logits with an image differ"


def _refused_by_default(model_type: str) -> Verdict | None:
    try:
        missing = refusal(CONFIG_MAPPING[model_type]())
    except Exception:
        return None
    return Verdict("refused", missing) if missing else None


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def section(verdicts: dict[str, Verdict]) -> str:
    """The section of docs/language-models.md for the running version."""
    groups = defaultdict(list)
    for model_type, found in sorted(verdicts.items()):
        groups[found.kind, found.reason].append(f"`{model_type}`")
    accepted = groups.pop(("accepted", ""))
    lines = [f"## Transformers {transformers.__version__}", "", f"Accepted, {len(accepted)}: {', '.join(accepted)}."]
    for kind, title in (
        ("refused", "Refused, for it has"),
        ("not built", "Not tried, for Transformers cannot build it"),
    ):
        rows = [f"| {reason} | {', '.join(names)} |" for (k, reason), names in sorted(groups.items()) if k == kind]
        if rows:
            lines += ["", f"| {title} | model types |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def sections_of_page() -> dict[str, str]:
    """The page's introduction and its sections, by their first line."""
    parts = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part.splitlines()[0]: part.strip() + "\n" for part in parts}


def main() -> None:
    """Write the section of the running version: `PYTHONPATH=tests python -m support.language_models`."""
    written = section({model_type: verdict(model_type) for model_type in MODEL_TYPES})
    sections = {**sections_of_page(), written.splitlines()[0]: written}
    PAGE.write_text("\n".join(sections.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
