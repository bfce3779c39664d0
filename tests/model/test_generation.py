"""Everything that `generate` does, with pictures."""

import pytest
import torch
import transformers
from packaging.version import Version
from support.models import tiny_inputs, tiny_model
from support.recorded import recorded_inputs
from transformers import TextIteratorStreamer

from emma_hf import EmmaForConditionalGeneration
from emma_hf.model.compat_emma import CACHE_NAME

RECORDED = ["single", "single_two_lines", "unicode", "multi_image", "history"]


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model()
    # Random models like to end at once; here they go on.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def encoded(monkeypatch):
    """Counts the pictures that go through the vision tower."""
    from emma_hf import EmmaModel

    counts = []
    original = EmmaModel.get_vision_features

    def counting(self, pixel_values):
        counts.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(EmmaModel, "get_vision_features", counting)
    return counts


def new_tokens(model, inputs, **kwargs) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return model.generate(**inputs, **settings)[:, length:]


def by_hand(model, inputs, steps: int = 8) -> torch.Tensor:
    """Greedy tokens without a cache: the whole row through the model at every step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=ids, attention_mask=mask, **images).logits[:, -1]
            logits[:, model.config.image_token_index] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids[:, -steps:]


def rows_of(inputs, counts):
    first = 0
    for row, count in enumerate(counts):
        single = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if count:
            single |= {n: inputs[n][first : first + count] for n in ("pixel_values", "instruction_input_ids")}
        first += count
        yield single


@pytest.mark.parametrize("name", RECORDED)
def test_greedy_tokens_equal_the_recorded_ones(model, cases, encoded, name):
    inputs = recorded_inputs(cases, name)
    tokens = new_tokens(model, inputs, max_new_tokens=12, eos_token_id=None)
    assert tokens[0].tolist() == cases[f"{name}.generated"][0, 1:].tolist()
    assert encoded == [len(inputs["pixel_values"])]


@pytest.mark.parametrize("images", [(1,), (2, 1), (0, 2), (0, 0), (3, 0, 1)])
def test_several_images_per_row_and_rows_without(tiny, images):
    inputs = tiny_inputs(tiny, images)
    assert new_tokens(tiny, inputs).tolist() == by_hand(tiny, inputs).tolist()


def test_left_padded_rows_equal_single_rows(tiny):
    counts = (1, 0, 2)
    inputs = tiny_inputs(tiny, counts)
    padded = dict(inputs)
    padded["input_ids"], padded["attention_mask"] = (inputs[n].clone() for n in ("input_ids", "attention_mask"))
    # Take words off the fronts of two rows, and pad there.
    for row, cut in ((0, 2), (1, 1)):
        padded["input_ids"][row, :cut] = 0
        padded["attention_mask"][row, :cut] = 0
    together = new_tokens(tiny, padded)
    for row, single in enumerate(rows_of(inputs, counts)):
        cut = {0: 2, 1: 1}.get(row, 0)
        for name in ("input_ids", "attention_mask"):
            single[name] = single[name][:, cut:]
        assert new_tokens(tiny, single)[0].tolist() == together[row].tolist()


def test_sampling_is_seeded_and_encodes_once(tiny, encoded):
    inputs = tiny_inputs(tiny)
    torch.manual_seed(1)
    first = new_tokens(tiny, inputs, do_sample=True, num_return_sequences=3)
    torch.manual_seed(1)
    assert torch.equal(first, new_tokens(tiny, inputs, do_sample=True, num_return_sequences=3))
    assert first.shape == (3, 8)
    assert encoded == [1, 1]


def test_beam_search_of_a_batch_equals_its_rows(tiny, encoded):
    counts = (2, 0, 1)
    inputs = tiny_inputs(tiny, counts)
    together = new_tokens(tiny, inputs, num_beams=3)
    assert encoded == [3]
    singles = [new_tokens(tiny, single, num_beams=3)[0].tolist() for single in rows_of(inputs, counts)]
    assert together.tolist() == singles
    assert together.tolist() != new_tokens(tiny, inputs).tolist()


def test_beam_search_finds_the_best_sequence_of_two_tokens(tiny):
    # With as many beams as words, two steps of beam search are exhaustive.
    inputs = tiny_inputs(tiny, (2,))
    found = new_tokens(tiny, inputs, num_beams=120, max_new_tokens=2)[0].tolist()
    with torch.no_grad():
        images = {n: inputs[n] for n in ("pixel_values", "instruction_input_ids")}
        allowed = torch.arange(120) != tiny.config.image_token_index
        first = tiny(**inputs).logits[0, -1].masked_fill(~allowed, -torch.inf).log_softmax(-1)
        scores = []
        for token in range(120):
            if not allowed[token]:
                scores.append(torch.full((120,), -torch.inf))
                continue
            ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            logits = tiny(input_ids=ids, **images).logits[0, -1].masked_fill(~allowed, -torch.inf)
            scores.append(first[token] + logits.log_softmax(-1))
    best = torch.stack(scores).argmax().item()
    assert found == [best // 120, best % 120]


def test_a_static_cache_and_no_cache_give_the_same_tokens(tiny, encoded):
    inputs = tiny_inputs(tiny, (1, 2))
    expected = new_tokens(tiny, inputs).tolist()
    encoded.clear()
    assert new_tokens(tiny, inputs, cache_implementation="static", disable_compile=True).tolist() == expected
    assert encoded == [3]
    # Without a cache every step is computed anew, pictures included.
    assert new_tokens(tiny, inputs, use_cache=False).tolist() == expected


def test_assisted_and_prompt_lookup_decoding_give_the_same_tokens(tiny, encoded):
    inputs = tiny_inputs(tiny)
    expected = new_tokens(tiny, inputs).tolist()
    assistant = tiny_model(seed=3, text={"hidden_size": 32, "num_hidden_layers": 1})
    assistant.generation_config = tiny.generation_config
    encoded.clear()
    assert new_tokens(tiny, inputs, assistant_model=assistant).tolist() == expected
    # Once for the model and once for its assistant.
    assert encoded == [1, 1]
    # Transformers 4.57 looks up prompts only with an end of sequence.
    unlikely = next(token for token in range(3, 110) if token not in expected[0])
    assert new_tokens(tiny, inputs, prompt_lookup_num_tokens=3, eos_token_id=unlikely).tolist() == expected


def test_the_placeholder_is_never_generated(tiny):
    inputs = tiny_inputs(tiny)
    image = tiny.config.image_token_index
    with torch.no_grad():
        state = tiny.model(**inputs).last_hidden_state[0, -1]
        tiny.lm_head.weight[image] = 100 * state
        assert tiny(**inputs).logits[0, -1].argmax() == image
        assert image not in new_tokens(tiny, inputs)
        tiny.lm_head.weight[image] = 0


def test_streaming_gives_the_words_of_the_answer(model, processor, cases):
    inputs = recorded_inputs(cases, "single")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = new_tokens(model, inputs, streamer=streamer, eos_token_id=None)
    assert "".join(streamer) == processor.tokenizer.decode(tokens[0])


def test_a_second_turn_keeps_the_cache(tiny, encoded):
    inputs = tiny_inputs(tiny)
    first = tiny.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
    expected = by_hand(tiny, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images})
    encoded.clear()
    second = tiny.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **images,
        **{CACHE_NAME: first[CACHE_NAME]},
        max_new_tokens=8,
        do_sample=False,
    )
    assert second[:, -8:].tolist() == expected.tolist()
    assert encoded == []


@pytest.mark.parametrize("only_new", [False, True])
def test_a_second_turn_brings_another_image(tiny, encoded, only_new):
    both = tiny_inputs(tiny, (2,))
    images = {name: both[name] for name in ("pixel_values", "instruction_input_ids")}
    one = tiny_inputs(tiny, (1,))
    one = {**one, **{name: value[:1] for name, value in images.items()}}
    first = tiny.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.full((1, 16), tiny.config.image_token_index)
    ids = torch.cat([first.sequences, more, torch.tensor([[5, 6, 7]])], 1)
    mask = torch.ones_like(ids)
    expected = by_hand(tiny, {"input_ids": ids, "attention_mask": mask, **images})
    encoded.clear()
    second = tiny.generate(
        input_ids=ids,
        attention_mask=mask,
        **{name: value[1:] if only_new else value for name, value in images.items()},
        **{CACHE_NAME: first[CACHE_NAME]},
        max_new_tokens=8,
        do_sample=False,
    )
    assert second[:, -8:].tolist() == expected.tolist()
    assert encoded == [1]


def test_a_second_turn_with_an_image_too_many_is_refused(tiny):
    both = tiny_inputs(tiny, (2,))
    images = {name: both[name] for name in ("pixel_values", "instruction_input_ids")}
    one = {**tiny_inputs(tiny, (1,)), **{name: value[:1] for name, value in images.items()}}
    first = tiny.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    cache = {CACHE_NAME: first[CACHE_NAME]}
    with pytest.raises(ValueError, match="Image features and image tokens do not match: 0 tokens .* 32 features"):
        tiny.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **cache, max_new_tokens=2)


def test_embeddings_of_a_prompt_whose_image_has_one_token():
    model = tiny_model(visual_tokens=1)
    inputs = tiny_inputs(model, (2, 2))
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {**inputs, "inputs_embeds": embeddings}
    del embedded["input_ids"]
    expected = new_tokens(model, inputs).tolist()
    assert new_tokens(model, embedded).tolist() == expected
    if Version(transformers.__version__) >= Version("5.20"):
        # Steps of several tokens. Older versions cannot look up after embeddings: 5.16 answers otherwise, Llama too.
        inputs = tiny_inputs(model, (2,))
        embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
        del embedded["input_ids"]
        expected = new_tokens(model, inputs, max_new_tokens=20).tolist()
        assert new_tokens(model, embedded, max_new_tokens=20, prompt_lookup_num_tokens=3).tolist() == expected


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_and_precomputed_features_give_the_same_tokens(tiny, encoded, beams):
    inputs = tiny_inputs(tiny, (2, 1))
    expected = new_tokens(tiny, inputs, num_beams=beams).tolist()
    images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
    mask = inputs["attention_mask"]
    embeddings = tiny.get_input_embeddings()(inputs["input_ids"]).detach()
    encoded.clear()
    embedded = {"inputs_embeds": embeddings, "attention_mask": mask, **images}
    assert new_tokens(tiny, embedded, num_beams=beams).tolist() == expected
    assert encoded == [3]
    vision = tiny.get_vision_features(images["pixel_values"]).detach()
    words = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    given = {**words, "vision_features": vision, "instruction_input_ids": images["instruction_input_ids"]}
    assert new_tokens(tiny, given, num_beams=beams).tolist() == expected
    features = tiny.get_image_features(**images).pooler_output.detach()
    assert new_tokens(tiny, {**words, "image_features": features}, num_beams=beams).tolist() == expected


def test_a_wrong_number_of_images_stops_beam_search(tiny):
    inputs = tiny_inputs(tiny, (2, 1))
    inputs = {**inputs, **{name: inputs[name][:2] for name in ("pixel_values", "instruction_input_ids")}}
    with pytest.raises(ValueError, match="Image features and image tokens do not match: 48 tokens"):
        new_tokens(tiny, inputs, num_beams=2)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_images_without_placeholders_are_refused(tiny, beams, use_cache):
    inputs = tiny_inputs(tiny, (1,))
    images = {name: inputs[name] for name in ("pixel_values", "instruction_input_ids")}
    words = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    embeddings = {"inputs_embeds": tiny.get_input_embeddings()(words["input_ids"]).detach()}
    features = {"image_features": tiny.get_image_features(**images).pooler_output.detach()}
    options = {"max_new_tokens": 3, "num_beams": beams, "use_cache": use_cache, "bos_token_id": 1}
    for prompt in ({}, words, {"input_ids": words["input_ids"][:, :1]}, embeddings):
        for given in (images, features):
            with pytest.raises(
                ValueError, match="Image features and image tokens do not match: 0 tokens .* 16 features"
            ):
                tiny.generate(**prompt, **given, **options)
    two = {name: torch.cat([value] * 2) for name, value in images.items()}
    with pytest.raises(ValueError, match="Image features and image tokens do not match: 16 tokens .* 32 features"):
        tiny.generate(**{**inputs, **two}, **options)


def test_a_prompt_with_images_is_not_prefilled_in_chunks(tiny):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        new_tokens(tiny, tiny_inputs(tiny, (1,)), prefill_chunk_size=7)


def test_every_model_suppresses_the_placeholder(tmp_path):
    model = tiny_model()
    image = model.config.image_token_index
    assert model.generation_config.suppress_tokens == [image]
    model.save_pretrained(tmp_path)
    assert EmmaForConditionalGeneration.from_pretrained(tmp_path).generation_config.suppress_tokens == [image]

    # A file of another tool, with a choice of its own, without one, and no file.
    path = tmp_path / "generation_config.json"
    path.write_text('{"suppress_tokens": [5], "do_sample": true}')
    loaded = EmmaForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert loaded.suppress_tokens == [5, image]
    assert loaded.do_sample
    path.write_text("{}")
    assert EmmaForConditionalGeneration.from_pretrained(tmp_path).generation_config.suppress_tokens == [image]
    path.unlink()
    assert EmmaForConditionalGeneration.from_pretrained(tmp_path).generation_config.suppress_tokens == [image]


def test_beams_of_a_prompt_without_images_are_those_of_no_image_inputs():
    model = tiny_model()
    inputs = tiny_inputs(model, images=(0,))
    empty = {
        "pixel_values": torch.zeros(0, 3, 28, 28),
        "instruction_input_ids": torch.zeros(0, 77, dtype=torch.long),
    }
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **empty, **options), model.generate(**inputs, **options))
