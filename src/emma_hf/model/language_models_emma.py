"""Which language models EMMA can be built around.

EMMA runs a model's decoder on embeddings and multiplies the hidden states by one matrix, the head. Serving engines and
trainers rely on that: they call the decoder and apply the head themselves. A language model that does more is refused,
because its logits would be wrong without an error. `docs/language-models.md` lists the accepted and the refused ones.
"""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.configuration_utils import PretrainedConfig

from .compat_emma import OWN_CACHE
from .errors_emma import EmmaError

# Model types that are refused whatever their config says, by what they have.
UNSUPPORTED = {
    "a bias in the head": "codegen ctrl git gptj phi xlm xlnet",
    "layers between the decoder and the head": (
        "bert bert-generation big_bird camembert data2vec-text dory electra ernie megatron-bert mega "
        "modernbert-decoder qdqbert reformer rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta "
        "xlm-roberta-xl xmod"
    ),
    "a recurrent state in place of a cache": "falcon_mamba mamba mamba2 rwkv xlstm",
    "token ids inside the decoder, where visual tokens have none": (
        "cpmant deepseek_v4 gemma3n_text gemma4_text qwen4_exp_text"
    ),
    "a cache of its own": "minimax",
    "no cache that `generate` can fill": "openai-gpt",
    "no decoder that runs alone": "gemma4_assistant gemma4_unified_assistant trocr",
}


def check_language_model(config: PretrainedConfig) -> None:
    """Raise `EmmaError` where EMMA would not compute what the causal language model of `config` computes."""
    reason = refusal(config)
    if reason:
        raise EmmaError(
            "`text_config` must be a causal language model whose logits are its decoder's hidden states times one "
            f"matrix: {config.model_type!r} has {reason}. Take a model that docs/language-models.md lists as accepted."
        )


def refusal(config: PretrainedConfig) -> str | None:
    """What the language model of `config` has that EMMA cannot do, or None where EMMA can be built around it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "no causal language model in Transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder beside its decoder (`is_encoder_decoder`)"
    sizes = {"vocab_size": getattr(config, "vocab_size", None), "hidden_size": getattr(config, "hidden_size", None)}
    for key, size in sizes.items():
        if not isinstance(size, int):
            return f"no `{key}`; where its language model has a config of its own, pass that one"
    return _refused_value(config) or _refused_type(config.model_type)


def _refused_value(config: PretrainedConfig) -> str | None:
    # Keys that change hidden states or logits behind the decoder, with the value that, like None, changes nothing.
    # Their names are literal, because a file that travels computes none.
    factors = (
        ("final_logit_softcapping", getattr(config, "final_logit_softcapping", None), None),
        ("logits_soft_cap", getattr(config, "logits_soft_cap", None), None),
        ("output_logit_soft_cap", getattr(config, "output_logit_soft_cap", None), None),
        ("logit_scale", getattr(config, "logit_scale", None), 1),
        ("logits_scaling", getattr(config, "logits_scaling", None), 1),
        ("logits_mup_width_multiplier", getattr(config, "logits_mup_width_multiplier", None), 1),
        ("lm_head_multiplier", getattr(config, "lm_head_multiplier", None), 1),
        ("lm_head_bias", getattr(config, "lm_head_bias", None), False),
    )
    for key, value, neutral in factors:
        if value not in (None, neutral):
            return f"`{key}`={value!r}, which EMMA's head does not apply"
    # Sizes of the head, where they are set.
    sizes = (
        ("word_embed_proj_dim", getattr(config, "word_embed_proj_dim", None), "hidden_size", config.hidden_size),
        ("output_vocab_size", getattr(config, "output_vocab_size", None), "vocab_size", config.vocab_size),
        ("unpadded_vocab_size", getattr(config, "unpadded_vocab_size", None), "vocab_size", config.vocab_size),
    )
    for key, value, other, expected in sizes:
        if value not in (None, expected):
            return f"`{key}`={value!r}, which differs from `{other}`={expected!r}"
    # The key is that of the layers' biases in other models.
    if config.model_type == "ernie4_5_moe" and config.use_bias:
        return "a bias in the head (`use_bias`)"
    return None


def _refused_type(model_type: str) -> str | None:
    if model_type in OWN_CACHE:
        return "a cache of its own in this version of Transformers; update it"
    return next((reason for reason, names in UNSUPPORTED.items() if model_type in names.split()), None)
