"""The arms of the replication: one function at the start, and what each of them trains."""

import pytest
import torch

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.questions import Question
from emma_hf.tiny.replication.arms import ALL, ARMS, FEW, ReplicationModel, Row, Task
from emma_hf.tiny.replication.questions import collate, encode, end_tokens
from emma_hf.tiny.scenes import Scene

QUESTIONS = [Question("How many things are there?", "3", "count"), Question("Is there a star?", "No", "existence")]


@pytest.fixture(scope="module")
def processor() -> EmmaProcessor:
    return EmmaProcessor.from_pretrained(EMMA_TINY)


def load() -> EmmaForConditionalGeneration:
    return EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval().requires_grad_(False)


def build(
    arm: str, tokens: int = 4, depth: int = 6, width: int | None = None
) -> tuple[ReplicationModel, EmmaForConditionalGeneration]:
    tiny = load()
    generator = torch.Generator().manual_seed(0)
    model = ReplicationModel(tiny, Row(arm, tokens, depth), 0.1 * torch.randn(64, 128, generator=generator))
    if width is not None:
        model.narrow_tokens(width, torch.randn(40, tokens, 192, generator=generator), seed=5)
    return model, tiny


def logits_of(
    model: ReplicationModel, tiny: EmmaForConditionalGeneration, processor: EmmaProcessor, shared: int = 1
) -> torch.Tensor:
    encoded = [encode(question, processor) for question in QUESTIONS]
    pixels = processor.image_processor([draw(Scene.random(7)), draw(Scene.random(8))], return_tensors="pt")
    vision = tiny.get_vision_features(pixels["pixel_values"])
    ids = torch.tensor([each.instruction for each in encoded])
    before = len(encoded[0].before)
    input_ids, attention_mask, is_image, _ = collate(encoded, model.arm, model.tokens, processor, before)
    features = tiny.model.get_instruction_features(ids)
    images = model.image_features(vision, features, end_tokens(ids, processor))
    return model.lm_head(model(input_ids, attention_mask, images, is_image, shared))


@pytest.mark.parametrize("task", [FEW, Task(1), Task(4), ALL], ids=str)
def test_all_arms_begin_as_the_same_function(task, processor):
    tokens, depth, width = task.tokens, task.depth, task.width
    logits = {arm: logits_of(*build(arm, tokens, depth, width), processor) for arm in "ABCDEG"}
    for arm in "BCDEG":
        assert torch.allclose(logits[arm], logits["A"], atol=1e-5), arm
    # The question before the picture is another prompt.
    assert logits_of(*build("F", tokens, depth, width), processor).shape[1] > logits["A"].shape[1]


def test_the_start_is_emma_tiny_with_its_text_term_folded_into_an_offset(processor):
    tiny = load()
    adaptation = tiny.model.modality_adaptation
    ids = torch.tensor([encode(question, processor).instruction for question in QUESTIONS])
    with torch.no_grad():
        projected = torch.nn.functional.gelu(
            adaptation.instruction_projection(tiny.model.get_instruction_features(ids))
        )
        mean_text = (adaptation.visual_alignment.weight[:, 64:] @ projected).mean(0)
        pixels = processor.image_processor([draw(Scene.random(7)), draw(Scene.random(8))], return_tensors="pt")
        vision = tiny.get_vision_features(pixels["pixel_values"])
        # Independently: the model's own fusion, with the text term's mean in place of each row's.
        own = adaptation(vision, tiny.model.get_instruction_features(ids))
        terms = adaptation.visual_alignment.weight[:, 64:] @ projected
        expected = tiny.model.multi_modal_projector(own - terms + mean_text)
        encoded = [encode(question, processor) for question in QUESTIONS]
        before = len(encoded[0].before)
        input_ids, attention_mask, _, _ = collate(encoded, ARMS["A"], 64, processor, before)
        outputs = tiny(input_ids=input_ids, attention_mask=attention_mask, image_features=expected)
    model = ReplicationModel(tiny, Row("A", 64), mean_text)
    logits = logits_of(model, tiny, processor)
    assert torch.allclose(logits, outputs.logits[:, 1:], atol=1e-4)


@pytest.mark.parametrize("arm", ["C", "F"])
def test_what_all_rows_begin_with_may_be_computed_once(arm, processor):
    before = len(encode(QUESTIONS[0], processor).before)
    results = []
    for shared in (1, before):
        model, tiny = build(arm)
        logits = logits_of(model, tiny, processor, shared)[:, before - shared :]
        logits.square().mean().backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        results.append({"logits": logits, **gradients})
    for name, whole in results[0].items():
        assert whole.abs().sum() > 0 or "instruction_projection" in name, name
        assert torch.allclose(results[1][name], whole, rtol=1e-4, atol=1e-5), name


TRAINED = {
    "A": set(),
    "B": {"visual_weight", "offset"},
    "C": {"visual_weight", "offset", "text_weight", "instruction_projection"},
    "D": {"visual_weight", "offset", "text_weight", "instruction_projection"},
    "E": {"visual_weight", "offset", "text_weight", "instruction_projection"},
    "F": set(),
    "G": {"visual_weight", "offset", "film"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_what_the_table_says(arm):
    model, tiny = build(arm)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == TRAINED[arm] | {"projector", "language_model", "lm_head"}
    assert not any(parameter.requires_grad for parameter in tiny.model.vision_tower.parameters())
    assert not any(parameter.requires_grad for parameter in tiny.model.instruction_encoder.parameters())
    groups = model.parameter_groups(1e-3, 2.0)
    assert sum(len(group["params"]) for group in groups) == sum(each.requires_grad for each in model.parameters())
    assert [group["lr"] for group in groups] == ([1e-3, 2e-3] if ARMS[arm].reads else [1e-3])


def test_visual_tokens_are_means_over_squares_of_the_grid():
    model, _ = build("A", tokens=4)
    whole, _ = build("A", tokens=64)
    vision = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(1))
    nothing = torch.empty(0)
    with torch.no_grad():
        pooled, every = (each.image_features(vision, nothing, nothing) for each in (model, whole))
    rows = every.reshape(8, 8, -1)
    expected = [rows[i : i + 4, j : j + 4].mean((0, 1)) for i in (0, 4) for j in (0, 4)]
    assert torch.allclose(pooled[0], torch.stack(expected), atol=1e-5)


def test_what_an_image_becomes_is_computed_in_32_bits():
    model, _ = build("C", FEW.tokens, FEW.depth, FEW.width)
    generator = torch.Generator().manual_seed(1)
    vision, instructions = (torch.randn(2, length, 128, generator=generator) for length in (64, 77))
    given = vision, instructions, torch.tensor([5, 9])
    with torch.autocast("cpu", torch.bfloat16):
        found = model.image_features(*given)
        assert model.lm_head(found).dtype == torch.bfloat16
    assert torch.equal(found, model.image_features(*given))


def test_film_scales_and_shifts_hidden_units_by_the_standardized_end_token():
    model, _ = build("G", tokens=1)
    generator = torch.Generator().manual_seed(1)
    vision, instructions = (torch.randn(2, length, 128, generator=generator) for length in (64, 77))
    ends = torch.tensor([5, 9])
    with torch.no_grad():
        model.film.weight.normal_(generator=generator)
        model.standardize_end_tokens(instructions[:, 3])
        found = model.hidden(vision, instructions, ends)
        whole = model.projector.linear_1(model.fused(vision, instructions))
    for image, end in enumerate(ends):
        told = (instructions[image, end] - instructions[:, 3].mean(0)) / instructions[:, 3].std(0)
        gain, shift = (model.film.weight @ told).split(192)
        torch.testing.assert_close(found[image], whole[image] + whole[image] * gain + shift, atol=1e-3, rtol=1e-4)


def test_a_narrow_token_holds_the_principal_components():
    model, _ = build("C", tokens=1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 1, 4, generator=generator) @ torch.randn(4, 192, generator=generator) + 3
    model.narrow_tokens(2, tokens, seed=0)
    # Independently: the eigenvectors of the covariance with the largest values, which have no sign.
    centered = (tokens - tokens.mean(0))[:, 0]
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    expected = centered @ vectors[:, [-1, -2]]
    numbers = model.narrow[0]((tokens[:, 0] - model.image_mean) / model.image_scale)
    torch.testing.assert_close(numbers.abs(), (expected / expected.std(0).mean()).abs(), atol=1e-3, rtol=1e-3)
    assert {name for name, each in model.narrow.named_parameters() if each.requires_grad} == {
        "0.weight", "0.bias", "1.weight", "1.bias",
    }  # fmt: skip
    for width in (0, 193):
        with pytest.raises(ValueError, match=f"has 192 numbers, of which 1 or more are left: got {width}"):
            model.narrow_tokens(width, tokens, seed=0)


def test_what_reads_narrow_tokens_begins_at_random_by_its_seed():
    tokens = torch.randn(40, 1, 192, generator=torch.Generator().manual_seed(0))
    states = []
    for seed in (1, 1, 2):
        model, _ = build("G", tokens=1)
        trained = {name: each.clone() for name, each in model.state_dict().items()}
        model.narrow_tokens(3, tokens, seed)
        states.append({name: each for name, each in model.state_dict().items() if name in trained})
    # All of the language model is new, nothing before it is.
    of_reader = {name for name in trained if name.startswith(("language_model.", "lm_head."))}
    assert {name for name, each in trained.items() if not torch.equal(each, states[0][name])} == of_reader
    assert all(torch.equal(states[0][name], states[1][name]) for name in trained)
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    norms = {name for name in of_reader if states[0][name].dim() == 1}
    assert norms
    assert all(torch.equal(states[0][name], torch.ones(192)) for name in norms)
    spreads = {name: states[0][name].std().item() for name in of_reader - norms}
    for name, spread in spreads.items():
        expected = 0.1 if "embed" in name else states[0][name].shape[1] ** -0.5
        assert spread == pytest.approx(expected, rel=0.02), name


def test_a_row_has_a_name():
    row = Row("C", 4, 6, 3, 2.0)
    assert row.name == "C-k4-d6-s3-r2"
    assert Row.parse(row.name) == row
    narrow = Row("G", 1, 2, 0, 1.0, 16)
    assert narrow.name == "G-k1-d2-s0-r1-w16"
    assert Row.parse(narrow.name) == narrow == Row.of("G", Task(1, 16, 2), 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("C4", "written ARM-kTOKENS-dDEPTH-sSEED-rRATE and may end in -wWIDTH, such as C-k4-d6-s0-r1: got 'C4'"),
        ("Z-k4-d6-s0-r1", "one of A, B, C, D, E, F, G: got 'Z'"),
    ],
)
def test_a_row_that_does_not_exist_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Row.parse(name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("A", 5), "a square whose root divides 8: got 5"),
        (Row("A", 9), "a square whose root divides 8: got 9"),
        (Row("A", 0), "a square whose root divides 8: got 0"),
        (Row("A", 4, 7), "has 6 layers: got depth 7"),
    ],
)
def test_a_row_that_cannot_be_built_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        ReplicationModel(load(), row, torch.zeros(64, 128))
