"""EMMA around a language model computes what the language model computes, or its config refuses it."""

import pytest
from support.language_models import (
    MODEL_TYPES,
    Verdict,
    emma_config,
    section,
    sections_of_page,
    small_config,
    verdict,
    verdict_of,
)

from emma_hf.model.errors_emma import EmmaError


# Between them: five names of the embedding, heads with and without a tied weight, absolute, rotary and ALiBi positions,
# experts, sliding windows.
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "falcon", "mpt", "gpt_neox", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_emma_computes_what_the_language_model_computes(model_type, tied):
    config = small_config(model_type)
    config.tie_word_embeddings = tied
    assert verdict_of(config) == Verdict("accepted")


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("granite", {"logits_scaling": 8.0}, "`logits_scaling`=8.0, which EMMA's head does not apply"),
        ("gemma2", {}, "`final_logit_softcapping`=30.0, which EMMA's head does not apply"),
        ("cohere", {}, "`logit_scale`=0.0625, which EMMA's head does not apply"),
        ("phimoe", {"lm_head_bias": True}, "`lm_head_bias`=True, which EMMA's head does not apply"),
        ("ernie4_5_moe", {"use_bias": True}, "a bias in the head (`use_bias`)"),
        ("opt", {"word_embed_proj_dim": 32}, "`word_embed_proj_dim`=32, which differs from `hidden_size`=64"),
        ("phi", {}, "a bias in the head"),
        ("bert", {}, "layers between the decoder and the head"),
        ("mamba", {}, "a recurrent state in place of a cache"),
        ("openai-gpt", {}, "no cache that `generate` can fill"),
        ("cpmant", {}, "token ids inside the decoder, where visual tokens have none"),
        ("t5", {}, "no causal language model in Transformers"),
        ("clip_text_model", {}, "no causal language model in Transformers"),
        ("bart", {}, "an encoder beside its decoder (`is_encoder_decoder`)"),
        ("gemma3", {}, "no `vocab_size`; where its language model has a config of its own, pass that one"),
    ],
)
def test_what_emma_cannot_do_is_refused_by_the_config(model_type, changes, reason):
    config = small_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(EmmaError) as refused:
        emma_config(config)
    assert str(refused.value) == (
        "`text_config` must be a causal language model whose logits are its decoder's hidden states times one matrix: "
        f"{model_type!r} has {reason}. Take a model that docs/language-models.md lists as accepted."
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_a_value_that_changes_no_logits_is_accepted(model_type, changes):
    config = small_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    assert verdict_of(config) == Verdict("accepted")


@pytest.mark.slow
def test_every_language_model_is_what_it_says_or_refused_as_the_page_lists_them():
    verdicts = {model_type: verdict(model_type) for model_type in MODEL_TYPES}
    assert {name: found.reason for name, found in verdicts.items() if found.kind == "wrong"} == {}
    written = section(verdicts)
    assert sections_of_page().get(written.splitlines()[0]) == written
