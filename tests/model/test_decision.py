"""Transformers' pipeline of decisions (5.24): probabilities of options, about text and about pictures."""

import importlib.util
import json

import pytest
import torch
import transformers
from support.processes import run_python

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.model.instruction_emma import PLACEHOLDER_ESCAPE
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers.decision") is None, reason="Transformers before 5.24 decides nothing"
)

QUESTIONS = {
    "star": {"type": "noul", "instructions": "Is there a star?"},
    "color": {"type": "choice", "instructions": "Which color?", "criteria": {"red": None, "blue": "like </s> it"}},
    "many": {"type": "score", "instructions": "How many?", "criteria": ["few", "some", "many"]},
}
# What each question becomes, written by hand: the options of the first are its two answers.
ASKED = {
    "star": ("Is there a star?\nAnswer Yes or No only.", ["Yes", "No"]),
    "color": (
        f"Which color?\nA. red\nB. blue: like <{PLACEHOLDER_ESCAPE}/s> it\nAnswer with the letter of the option that fits best "
        "(A to B) only.",
        ["A", "B"],
    ),
    "many": (
        "How many?\nA. few\nB. some\nC. many\nAnswer with the letter of the level that fits best (A to C) only.",
        ["A", "B", "C"],
    ),
}
SYSTEM = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def loaded():
    model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype=torch.float32).eval()
    return model, EmmaProcessor.from_pretrained(EMMA_TINY)


def probabilities(loaded, prompt: str, labels: list[str], **options) -> list[float]:
    """Softmax over the labels of the logits that follow the whole of `prompt`."""
    model, processor = loaded
    inputs = processor(text=prompt, return_tensors="pt", **options)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    ids = [processor.tokenizer.convert_tokens_to_ids(f"▁{label}") for label in labels]
    weights = torch.exp(logits[ids] - logits[ids].max())
    return (weights / weights.sum()).tolist()


def decide(loaded, request, **options):
    model, processor = loaded
    pipe = transformers.pipeline("decision", model=model, tokenizer=processor.tokenizer, processor=processor, **options)
    return pipe(request)


def check(answers: dict, expected: dict[str, list[float]]) -> None:
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        if answer["type"] == "noul":
            found = [answer["noul"], 1 - answer["noul"]]
        else:
            found = list(answer["probabilities"].values())
        assert all(0 <= value <= 1 for value in found)
        assert sum(found) == pytest.approx(1, abs=1e-6)
        assert found == pytest.approx(expected[name], abs=1e-5)
    # Options that are equally likely would hide an exchange of labels.
    assert len({round(value, 3) for row in expected.values() for value in row}) == sum(map(len, expected.values()))
    assert answers["color"]["choice"] == ["red", "blue"][expected["color"][1] > expected["color"][0]]
    assert answers["many"]["score"] == pytest.approx(expected["many"][1] + 2 * expected["many"][2], abs=1e-5)


def test_about_a_text(loaded):
    answers = decide(loaded, {"state": "There is a red star.", "questions": QUESTIONS})
    expected = {
        name: probabilities(loaded, f"{SYSTEM}USER: There is a red star.\n\n{text} ASSISTANT:", labels)
        for name, (text, labels) in ASKED.items()
    }
    check(answers, expected)


def test_a_template_may_place_the_picture(loaded):
    # Its messages are empty: the picture reaches the processor beside them, and the instruction is in the prompt.
    template = (
        "{{ bos_token }}USER: {% for part in state %}{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ question.instructions }} ASSISTANT:"
    )
    scene = draw(Scene.random(0))
    request = {"state": "img-1drawn.\n", "questions": {"star": QUESTIONS["star"]}, "assets": {"img-1": scene}}
    config = transformers.decision.DecisionConfig(chat_template=template)
    answer = decide(loaded, request, decision_config=config)["star"]["noul"]
    prompt = "<s>USER: <image>\ndrawn.\nIs there a star? ASSISTANT:"
    expected = probabilities(loaded, prompt, ["Yes", "No"], images=scene, instructions="drawn.")
    assert answer == pytest.approx(expected[0], abs=1e-5)


def test_from_a_folder_alone(loaded, tmp_path):
    for part in loaded:
        part.save_pretrained(tmp_path / "tiny")
    draw(Scene.random(0)).save(tmp_path / "scene.png")
    request = {"state": "img-1 was drawn.", "questions": QUESTIONS, "assets": {"img-1": "scene.png"}}
    code = f"""
import json
from transformers import pipeline
print("ANSWER", json.dumps(pipeline("decision", model="tiny", trust_remote_code=True)({request!r})))
"""
    done = run_python(code, cwd=tmp_path, importable=False, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.split("ANSWER ")[1])
    here = decide(loaded, {**request, "assets": {"img-1": draw(Scene.random(0))}})
    assert answers["star"]["noul"] == pytest.approx(here["star"]["noul"], abs=1e-6)
    assert answers["many"]["probabilities"] == pytest.approx(here["many"]["probabilities"], abs=1e-6)


def test_about_a_picture(loaded):
    scene = draw(Scene.random(0))
    request = {"state": "img-1 was drawn.", "questions": QUESTIONS, "assets": {"img-1": scene}}
    expected = {
        name: probabilities(
            loaded,
            f"{SYSTEM}USER: <image>\n was drawn.\n\n{text} ASSISTANT:",
            labels,
            images=scene,
            instructions="was drawn.",
        )
        for name, (text, labels) in ASKED.items()
    }
    check(decide(loaded, request), expected)
