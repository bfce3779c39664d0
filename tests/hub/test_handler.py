"""The handler of Inference Endpoints: its contract, and what it says of malformed requests."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support.images import png_header
from support.processes import run_python

from emma_hf import EMMA_TINY, EmmaForConditionalGeneration, EmmaProcessor
from emma_hf.hub import export
from emma_hf.hub.template import handler as handler_file
from emma_hf.hub.template.handler import PARAMETERS, EndpointHandler
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.serving import limits
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


def handler_of(folder: Path) -> EndpointHandler:
    """A handler of the classes of this process: what it does with requests is the same."""
    one = object.__new__(EndpointHandler)
    one.processor = EmmaProcessor.from_pretrained(folder)
    one.model = EmmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    return one


@pytest.fixture(scope="module")
def handler() -> EndpointHandler:
    return handler_of(EMMA_TINY)


def expected(handler, images, question: str = QUESTION, **kwargs) -> list[dict[str, str]]:
    processor, model = handler.processor, handler.model
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=images, text=prompt, return_tensors="pt", **kwargs).to(dtype=model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return [{"generated_text": processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()}]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("more", [{}, {"is_quantized": False}, {"is_quantized": True}])
def test_an_endpoint_loads_the_folder_that_it_lies_in(monkeypatch, more, cuda):
    done = []
    model = SimpleNamespace(**more, to=lambda device: done.append(device) or model, eval=lambda: "model")
    for name, part in (("AutoProcessor", "processor"), ("AutoModelForImageTextToText", model)):
        load = lambda folder, part=part, **options: done.append((folder, options)) or part  # noqa: E731
        monkeypatch.setattr(handler_file, name, SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    options = {"trust_remote_code": True, "local_files_only": True}
    for arguments, folder in (((), str(Path(handler_file.__file__).parent)), ((Path("here"),), "here")):
        endpoint = EndpointHandler(*arguments)
        assert (endpoint.processor, endpoint.model) == ("processor", "model")
        placed = [] if more.get("is_quantized") else ["cuda" if cuda else "cpu"]
        assert done == [(folder, options), (folder, {**options, "dtype": "auto"}), *placed]
        done.clear()


def test_every_form_of_a_picture_gives_the_models_answer(handler, scene):
    text = in_base64(scene)
    answer = expected(handler, [scene])
    parameters = {"max_new_tokens": 8}
    for image in (text, f"data:image/png;base64,{text}", f"{text[:40]}\n{text[40:]}", base64.b64decode(text), scene):
        assert handler({"inputs": {"image": image, "question": QUESTION}, "parameters": parameters}) == answer
    assert (
        handler({"inputs": {"images": [text], "text": QUESTION}, "parameters": {**parameters, "top_k": None}}) == answer
    )


def test_several_pictures_and_an_instruction_reach_the_model(handler, scene, seen):
    other = draw(Scene.random(5), 112)
    inputs = {"images": [in_base64(scene), in_base64(other)], "question": QUESTION}
    assert handler({"inputs": inputs, "parameters": {"max_new_tokens": 8}}) == expected(handler, [scene, other])
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
    inputs = {"image": scene, "question": QUESTION, "instruction": "the star"}
    handler({"inputs": inputs, "parameters": options})
    assert {name: seen[name] for name in options} == options
    ids = handler.processor(
        images=scene, text="USER: <image>\n? ASSISTANT:", instructions="the star", return_tensors="pt"
    )
    assert seen["instruction_input_ids"].tolist() == ids["instruction_input_ids"].tolist()


def test_a_repository_with_fewer_visual_tokens(handler, scene, tmp_path, monkeypatch):
    short = handler_of(export(EMMA_TINY, tmp_path / "tiny", examples=[], visual_tokens=8))
    inputs = {"image": in_base64(scene), "question": "Describe the picture."}
    answer = short({"inputs": inputs, "parameters": {"max_new_tokens": 8}})
    assert answer != expected(handler, [scene], inputs["question"])
    # The repository that keeps all, loaded with as many.
    monkeypatch.setattr(handler, "processor", EmmaProcessor.from_pretrained(EMMA_TINY, visual_tokens=8))
    monkeypatch.setattr(handler.model.config, "visual_tokens", 8)
    assert answer == expected(handler, [scene], inputs["question"])
    with pytest.raises(ValueError, match="room for at most 63 pictures: got 64"):
        short({"inputs": {"images": [scene] * 64, "question": QUESTION}})


@pytest.fixture
def seen(handler, monkeypatch) -> dict:
    """What the handler passed to `generate` last."""
    given = {}
    generate = handler.model.generate
    monkeypatch.setattr(handler.model, "generate", lambda **kwargs: given.update(kwargs) or generate(**kwargs))
    return given


@pytest.mark.parametrize(
    "question",
    ["What does ASSISTANT: mean here?", "Is USER: a heart?", "Is <image> a star?", "A </s> ASSISTANT: star?"],
)
def test_the_instruction_is_the_question_whatever_it_says(handler, scene, seen, question):
    handler({"inputs": {"image": scene, "question": question}, "parameters": {"max_new_tokens": 1}})
    expected_ids = encode_instruction(handler.processor.instruction_tokenizer, question, 77)
    assert seen["instruction_input_ids"].tolist() == [expected_ids]
    placeholders = seen["input_ids"] == handler.model.config.image_token_index
    assert placeholders.sum() == handler.processor.image_seq_length


def test_limits_are_those_of_the_server():
    assert handler_file.IMAGE_FORMATS == limits.IMAGE_FORMATS
    assert handler_file.CHARACTERS_PER_POSITION == limits.CHARACTERS_PER_POSITION
    assert PARAMETERS == limits.HANDLER_PARAMETERS
    defaults = limits.Limits()
    assert defaults.request_bytes == handler_file.REQUEST_BYTES
    assert defaults.picture_pixels == handler_file.PICTURE_PIXELS
    assert defaults.request_pixels == handler_file.REQUEST_PIXELS


def test_the_model_s_context_is_the_limit(handler, scene, seen):
    for images, question, message in (
        ([scene] * 9, QUESTION, "room for at most 7 pictures: got 9"),
        (
            [scene],
            "heart " * 600,
            "maximum context length is 512 tokens. .* leave room for an answer: got [0-9]+ tokens",
        ),
        ([scene], "a" * 40_000, "`question` may have at most 32768 characters: got 40000"),
    ):
        with pytest.raises(ValueError, match=message):
            handler({"inputs": {"images": images, "question": question}})
    assert not seen
    handler({"inputs": {"image": scene, "question": "heart " * 300}, "parameters": {"max_new_tokens": 4096}})
    assert seen["input_ids"].shape[1] + seen["max_new_tokens"] == 512


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO"])
def test_formats_that_are_not_the_web_s_are_refused(handler, form, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started a program"))
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, form)
    with pytest.raises(ValueError, match="must be one of PNG, JPEG, WEBP, GIF, BMP, TIFF: got .* of something else"):
        handler({"inputs": {"image": file.getvalue(), "question": QUESTION}})


def test_pixels_and_bytes_are_limited_before_anything_is_decoded(handler, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    large = png_header(13_000, 13_000)
    for images, message in (
        ([large], "at most 36000000 pixels: got 13000x13000. Make it smaller first.$"),
        ([png_header(50_000, 50_000)], "cannot be opened .*exceeds limit"),
        ([png_header(6000, 6000)] * 3, "at most 72000000 pixels together: got 108000000"),
        ([large + bytes(2**24)] * 2, "at most 33554432 bytes: got "),
    ):
        with pytest.raises(ValueError, match=message):
            handler({"inputs": {"images": images, "question": QUESTION}})


def test_a_photo_is_upright(handler, scene, seen):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    scene.save(file, "PNG", exif=exif)
    handler({"inputs": {"image": file.getvalue(), "question": QUESTION}, "parameters": {"max_new_tokens": 1}})
    turned = handler.processor.image_processor(scene.transpose(Image.Transpose.ROTATE_270), return_tensors="pt")
    assert seen["pixel_values"].tolist() == turned["pixel_values"].to(handler.model.dtype).tolist()


def test_whole_numbers_are_numbers(handler, scene, seen):
    parameters = {"do_sample": True, "temperature": 2, "top_p": 1, "repetition_penalty": 1, "max_new_tokens": 2}
    handler({"inputs": {"image": scene, "question": QUESTION}, "parameters": parameters})
    assert {name: (seen[name], type(seen[name])) for name in ("temperature", "top_p", "max_new_tokens")} == {
        "temperature": (2.0, float),
        "top_p": (1.0, float),
        "max_new_tokens": (2, int),
    }


def test_malformed_requests_are_told_what_is_wrong(handler, scene):
    text = in_base64(scene)
    good = {"image": text, "question": QUESTION}
    cases = [
        ("hello", "must be a dictionary with `inputs`: got str"),
        ({}, '`inputs` must be .* `question`: got NoneType. Send {"inputs": {"image": "<base64>", "question": "..."}}.$'),
        ({"inputs": "What?"}, "`inputs` must be a dictionary .*: got str"),
        ({"inputs": {**good, "picture": text, "x": 1}}, "`inputs` knows image, .*: got picture, x. Leave that out"),
        ({"inputs": {"image": text}}, "one question that is not empty"),
        ({"inputs": {"image": text, "question": "  "}}, "one question that is not empty"),
        ({"inputs": {"image": text, "question": 3}}, "one question that is not empty"),
        ({"inputs": {**good, "text": "And?"}}, "one question that is not empty"),
        ({"inputs": {"question": "What?"}}, "must hold a picture.*got none"),
        ({"inputs": {"images": [], "question": "What?"}}, "^`inputs` must hold a picture.*got none.$"),
        ({"inputs": {**good, "images": [text]}}, "^`inputs` .* `images`: got both. Send all pictures in `images`.$"),
        ({"inputs": {"images": text, "question": "What?"}}, "`images` must be a list of pictures: got str"),
        ({"inputs": {**good, "image": "http://10.0.0.1/secret"}}, "got 'http://10.0.0.1/secret'. This endpoint opens no"),
        ({"inputs": {**good, "image": "file:///etc/passwd"}}, "This endpoint opens no address"),
        ({"inputs": {**good, "image": "/etc/passwd"}}, "must be base64 or a data URL"),
        ({"inputs": {**good, "image": "not base64!"}}, "must be base64 or a data URL: got 'not base64!'"),
        ({"inputs": {**good, "image": 7}}, "must be base64, a data URL, bytes or a picture: got int"),
        ({"inputs": {**good, "image": base64.b64encode(b"no picture").decode()}}, "must be one of PNG, .*: got 10 bytes of something else"),
        ({"inputs": {**good, "image": base64.b64decode(text)[:200]}}, "cannot be decoded .* Is it complete"),
        ({"inputs": {**good, "question": "Hi \ud83d"}}, "`question` must be valid Unicode: got half a character at position 3"),
        ({"inputs": {**good, "instruction": "\ud83d"}}, "`instruction` must be valid Unicode: got half a character"),
        ({"inputs": good, "parameters": {"temperature": 1e-38}}, "`temperature` must be .*from 1e-06 to 10: got 1e-38"),
        ({"inputs": good, "parameters": {"temperature": 10.5}}, "`temperature` must be .*from 1e-06 to 10: got 10.5"),
        ({"inputs": good, "parameters": {"max_new_tokens": 4097}}, "`max_new_tokens` must be .*to 4096: got 4097"),
        ({"inputs": good, "parameters": {"num_beams": 17}}, "`num_beams` must be .*from 1 to 16: got 17"),
        ({"inputs": good, "parameters": {"top_p": 1.01}}, "`top_p` must be .*from 0.01 to 1: got 1.01"),
        ({"inputs": good, "parameters": {"top_k": 1_000_001}}, "`top_k` must be .*to 1000000: got 1000001"),
        ({"inputs": good, "parameters": {"repetition_penalty": 11}}, "`repetition_penalty` must be .*to 10: got 11"),
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


def test_the_prompt_is_the_chat_template_s(handler, scene, seen):
    handler({"inputs": {"image": scene, "question": QUESTION}, "parameters": {"top_k": None, "max_new_tokens": 1}})
    prompt = handler.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    assert prompt.endswith(f"{QUESTION} ASSISTANT:")
    assert seen["input_ids"].tolist() == handler.processor(images=scene, text=prompt)["input_ids"]
    assert seen["max_new_tokens"] == 1


def test_every_limit_is_itself_allowed(handler, scene, seen, monkeypatch):
    request = {"inputs": {"image": scene, "question": QUESTION, "instruction": "the star " * 20}}
    handler({**request, "parameters": {"max_new_tokens": 1}})
    length = seen["input_ids"].shape[1]
    monkeypatch.setattr(type(handler.model.config), "position_count", length + 1)
    handler(request)
    assert seen["max_new_tokens"] == 1
    # Not every language model calls them so.
    monkeypatch.setattr(type(handler.model.config), "position_count", length)
    with pytest.raises(ValueError, match=f"context length is {length} tokens. .* got {length} tokens"):
        handler(request)
    # One image and one token more: the image may come, its question may not.
    monkeypatch.setattr(type(handler.model.config), "position_count", handler.processor.image_seq_length + 1)
    with pytest.raises(ValueError, match="leave room for an answer"):
        handler(request)
    data = base64.b64decode(in_base64(scene))
    monkeypatch.setattr(handler_file, "REQUEST_BYTES", 2 * len(data))
    monkeypatch.setattr(handler_file, "REQUEST_PIXELS", 2 * scene.width * scene.height)
    monkeypatch.setattr(handler_file, "PICTURE_PIXELS", scene.width * scene.height)
    assert len(handler_file._read_images({"images": [data, data]}, 2)) == 2
    handler_file._check_text("question", "abc", 3)
    assert handler_file._read_parameters(None) == {"max_new_tokens": 256, "do_sample": False}


def test_a_pil_image_is_taken_as_it_is(scene):
    turned = scene.copy()
    turned.getexif()[0x0112] = 6
    (image,) = handler_file._read_images({"image": turned}, 1)
    assert image.tobytes() == scene.tobytes()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://10.0.0.1/x.png", "This endpoint opens no address"),
        (" http://10.0.0.1/x.png", "got 'http://10.0.0.1/x.png'. This endpoint opens no address"),
        ("QUJD!QUJD", "must be base64 or a data URL: got 'QUJD!QUJD'"),
    ],
)
def test_a_text_that_is_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        handler_file._decode_image(image)


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
@pytest.mark.parametrize("visual_tokens", [None, 8])
def test_an_endpoint_answers_from_the_folder_alone(scene, tmp_path, visual_tokens):
    folder = export(EMMA_TINY, tmp_path / "tiny", examples=[], visual_tokens=visual_tokens)
    done = run_python(
        ENDPOINT, folder, in_base64(scene), QUESTION,
        cwd=tmp_path, importable=False, HF_MODULES_CACHE=str(tmp_path / "modules"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("REPLY ")[-1]) == expected(handler_of(folder), [scene])
