"""The handler of Inference Endpoints: its contract, and what it says of malformed requests."""

import base64
import io
import json

import pytest
from PIL import Image
from support.processes import run_python

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.hub import export
from emma_hf.hub.template.handler import PARAMETERS, EndpointHandler
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

QUESTION = "How many things are there?"


def in_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return draw(Scene.random(0), 112)


@pytest.fixture(scope="module")
def handler() -> EndpointHandler:
    """A handler of the classes of this process: what it does with requests is the same."""
    one = object.__new__(EndpointHandler)
    one.processor = EmmaProcessor.from_pretrained(EMMA_TINY)
    one.model = EmmaForConditionalGeneration.from_pretrained(EMMA_TINY, dtype="auto").eval()
    return one


def expected(handler, images, question: str = QUESTION, **kwargs) -> list[dict[str, str]]:
    processor, model = handler.processor, handler.model
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=images, text=prompt, return_tensors="pt", **kwargs).to(dtype=model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return [{"generated_text": processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()}]


def test_every_form_of_a_picture_gives_the_models_answer(handler, scene):
    text = in_base64(scene)
    answer = expected(handler, [scene])
    parameters = {"max_new_tokens": 8}
    for image in (text, f"data:image/png;base64,{text}", f"{text[:40]}\n{text[40:]}", base64.b64decode(text), scene):
        assert handler({"inputs": {"image": image, "question": QUESTION}, "parameters": parameters}) == answer
    assert (
        handler({"inputs": {"images": [text], "text": QUESTION}, "parameters": {**parameters, "top_k": None}}) == answer
    )


def test_several_pictures_and_an_instruction_reach_the_model(handler, scene, monkeypatch):
    other = draw(Scene.random(5), 112)
    inputs = {"images": [in_base64(scene), in_base64(other)], "question": QUESTION}
    assert handler({"inputs": inputs, "parameters": {"max_new_tokens": 8}}) == expected(handler, [scene, other])
    seen = {}
    generate = handler.model.generate
    monkeypatch.setattr(handler.model, "generate", lambda **kwargs: seen.update(kwargs) or generate(**kwargs))
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
    inputs = {"image": scene, "question": QUESTION, "instruction": "the star"}
    handler({"inputs": inputs, "parameters": options})
    assert {name: seen[name] for name in options} == options
    ids = handler.processor(
        images=scene, text="USER: <image>\n? ASSISTANT:", instructions="the star", return_tensors="pt"
    )
    assert seen["instruction_input_ids"].tolist() == ids["instruction_input_ids"].tolist()


def test_words_that_look_like_a_placeholder_are_words(handler, scene):
    data = {"inputs": {"image": scene, "question": "Is <image> a star?"}, "parameters": {"max_new_tokens": 2}}
    assert len(handler(data)) == 1


def test_malformed_requests_are_told_what_is_wrong(handler, scene):
    text = in_base64(scene)
    good = {"image": text, "question": QUESTION}
    cases = [
        ("hello", "must be a dictionary with `inputs`: got str"),
        ({}, "`inputs` must be a dictionary with `image` and `question`: got NoneType"),
        ({"inputs": "What?"}, "`inputs` must be a dictionary .*: got str"),
        ({"inputs": {**good, "picture": text}}, "`inputs` knows image, .*: got picture"),
        ({"inputs": {"image": text}}, "one question that is not empty"),
        ({"inputs": {"image": text, "question": "  "}}, "one question that is not empty"),
        ({"inputs": {"image": text, "question": 3}}, "one question that is not empty"),
        ({"inputs": {**good, "text": "And?"}}, "one question that is not empty"),
        ({"inputs": {"question": "What?"}}, "must hold a picture.*got none"),
        ({"inputs": {"images": [], "question": "What?"}}, "must hold a picture.*got none"),
        ({"inputs": {**good, "images": [text]}}, "`image` or `images`: got both"),
        ({"inputs": {"images": text, "question": "What?"}}, "`images` must be a list of pictures: got str"),
        ({"inputs": {**good, "image": "http://10.0.0.1/secret"}}, "got 'http://10.0.0.1/secret'. This endpoint opens no"),
        ({"inputs": {**good, "image": "file:///etc/passwd"}}, "This endpoint opens no address"),
        ({"inputs": {**good, "image": "/etc/passwd"}}, "must be base64 or a data URL"),
        ({"inputs": {**good, "image": "not base64!"}}, "must be base64 or a data URL: got 'not base64!'"),
        ({"inputs": {**good, "image": 7}}, "must be base64, a data URL, bytes or a picture: got int"),
        ({"inputs": {**good, "image": base64.b64encode(b"no picture").decode()}}, "is not a picture that Pillow can read"),
        ({"inputs": {**good, "instruction": 3}}, "`instruction` must be a text: got int"),
        ({"inputs": good, "parameters": [1]}, "`parameters` must be a dictionary: got list"),
        ({"inputs": good, "parameters": {"custom_generate": "org/code"}}, "`parameters` knows .*: got custom_generate"),
        ({"inputs": good, "parameters": {"max_new_tokens": 0}}, "`max_new_tokens` must be .*from 1 to 4096: got 0"),
        ({"inputs": good, "parameters": {"max_new_tokens": True}}, "`max_new_tokens` must be a number .*: got True"),
        ({"inputs": good, "parameters": {"max_new_tokens": 8.5}}, "`max_new_tokens` must be a number .*: got 8.5"),
        ({"inputs": good, "parameters": {"temperature": float("nan")}}, "`temperature` must be .*: got nan"),
        ({"inputs": good, "parameters": {"do_sample": 1}}, "`do_sample` must be true or false: got 1"),
    ]  # fmt: skip
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            handler(data)


def test_nothing_of_generate_that_loads_code_can_be_reached():
    assert not {"custom_generate", "trust_remote_code", "assistant_model", "logits_processor"} & set(PARAMETERS)


ENDPOINT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
endpoint = EndpointHandler(sys.argv[1])
assert type(endpoint.model).__module__.startswith("transformers_modules")
reply = endpoint({"inputs": {"image": sys.argv[2], "question": sys.argv[3]}, "parameters": {"max_new_tokens": 8}})
print("REPLY " + json.dumps(reply))
"""


@pytest.mark.slow
def test_an_endpoint_answers_from_the_folder_alone(handler, scene, tmp_path):
    folder = export(EMMA_TINY, tmp_path / "tiny", examples=[])
    done = run_python(
        ENDPOINT, folder, in_base64(scene), QUESTION,
        cwd=tmp_path, importable=False, HF_MODULES_CACHE=str(tmp_path / "modules"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("REPLY ")[-1]) == expected(handler, [scene])
