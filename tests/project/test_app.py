"""The chat page: what it answers, what it says to mistakes, and a visit in headless Chromium."""

import copy
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the chat page needs gradio: `make test-app`")
import httpx
import torch
from support.images import png_header

from emma_hf import EMMA_TINY
from emma_hf.model.instruction_emma import encode_instruction
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

APP = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "app.py"), run_name="app")


@pytest.fixture(scope="module")
def chat():
    return APP["Chat"](EMMA_TINY)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    draw(Scene.random(0), 336).save(path)
    return {"path": str(path), "orig_name": "scene.png"}


def generated(chat, path, *questions) -> str:
    """The last answer by `generate` alone, in the README's words."""
    messages = []
    for index, question in enumerate(questions):
        picture = [] if index else [{"type": "image", "url": str(path)}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        inputs = chat.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(chat.model.device, chat.model.dtype)
        tokens = chat.model.generate(**inputs, max_new_tokens=200, do_sample=False)
        answer = chat.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return answer


def texts(conversation) -> list[str]:
    return [message["content"][-1]["text"] for message in conversation["messages"]]


def last(iterator):
    *_, final = iterator
    return final


def test_answers_grow_and_are_those_of_generate(chat, scene):
    grown = [texts(conversation)[-1] for conversation in chat.answer("Describe the picture.", scene)]
    assert grown[-1] == generated(chat, scene["path"], "Describe the picture.") != ""
    assert len(set(grown)) > 3
    assert all(grown[-1].startswith(text) for text in grown)


@pytest.mark.parametrize("turn", ["image", "last"])
def test_a_second_question_keeps_the_picture_and_the_words(chat, scene, turn, monkeypatch):
    questions = ["How many stars are there?", "Is there a heart?"]
    first = last(chat.answer(questions[0], scene, None, turn))
    second = last(chat.answer(questions[1], scene, first, turn))
    monkeypatch.setattr(chat.processor, "instruction_turn", turn)
    expected = [generated(chat, scene["path"], *questions[: count + 1]) for count in range(2)]
    assert texts(second) == [questions[0], expected[0], questions[1], expected[1]]
    assert [text for text, label in second["marked"] if label] == [questions[turn == "last"]]


def test_another_picture_begins_another_conversation(chat, scene, tmp_path):
    first = last(chat.answer("Is there a heart?", scene))
    other = {"path": shutil.copy(scene["path"], tmp_path / "other.png"), "orig_name": "other.png"}
    assert texts(last(chat.answer("Is there a star?", other, first)))[0] == "Is there a star?"


def test_marked_words_are_those_that_were_read(chat, scene):
    asked = "Is there a heart?\nAnswer the question using a single word or phrase."
    assert next(chat.answer(asked, scene))["marked"] == [
        ("Is there a heart?", "instruction"),
        ("\nAnswer the question using a single word or phrase.\n", None),
    ]
    asked = "heart " * 60 + "star " * 30
    ((marked, _),) = [piece for piece in next(chat.answer(asked, scene))["marked"] if piece[1]]
    tokenizer = chat.processor.instruction_tokenizer
    read = encode_instruction(tokenizer, asked)
    assert marked == ("heart " * 60 + "star " * 15).strip()
    assert encode_instruction(tokenizer, marked) == read != encode_instruction(tokenizer, marked[: -len(" star")])


def test_where_a_question_moved_the_picture(chat, scene):
    """Against the model's own visual tokens, and on emma-tiny the difference that the analysis finds: next to none."""
    instruction, other = "Is there a heart?", "What colour is the star?"
    shown = chat.moved(scene, instruction, other)
    pixels = chat.processor.image_processor([APP["Image"].open(scene["path"])], return_tensors="pt")["pixel_values"]
    texts = [instruction, other, *APP["EXAMPLE_QUESTIONS"]]
    ids = torch.tensor([encode_instruction(chat.processor.instruction_tokenizer, text) for text in texts])
    model = copy.deepcopy(chat.model).float()
    with torch.no_grad():
        tokens = model.get_image_features(pixels.expand(len(texts), -1, -1, -1), ids).pooler_output
    shares = (tokens[:2] - tokens.mean(0)).norm(dim=-1) / tokens[0].norm(dim=-1)
    for (image, text), question, expected in zip(shown, (instruction, other), shares, strict=True):
        assert image.size == (APP["MOVED_SIDE"], APP["MOVED_SIDE"])
        mean, largest = (float(number) for number in re.findall(r"([\d.]+)%", text))
        assert question in text
        assert mean == pytest.approx(100 * expected.mean().item(), abs=0.3)
        assert largest == pytest.approx(100 * expected.max().item(), abs=0.5)
    # Of both pictures the patch that moved most keeps its colors, any other is darker.
    moved = shares / shares.max()
    whole = (pixels[0] * 0 + 1).mul(255)
    bright = chat._dimmed((whole / 255 - mean_of(chat)) / std_of(chat), moved[0])
    side = APP["MOVED_SIDE"] // 8
    levels = [bright.getpixel((column * side + 5, row * side + 5))[0] for row in range(8) for column in range(8)]
    assert levels == pytest.approx((255 * (APP["DIMMED"] + (1 - APP["DIMMED"]) * moved[0])).tolist(), abs=1)


def mean_of(chat) -> torch.Tensor:
    return torch.tensor(chat.processor.image_processor.image_mean)[:, None, None]


def std_of(chat) -> torch.Tensor:
    return torch.tensor(chat.processor.image_processor.image_std)[:, None, None]


BAD = {
    "notes.png": (
        lambda whole: b"not a picture",
        "'notes.png' cannot be shown. A picture must be one of PNG, JPEG, WEBP, GIF, BMP, TIFF: got 13 bytes",
    ),
    "cut.png": (
        lambda whole: whole[: len(whole) // 2],
        "'cut.png' cannot be shown. The picture (PNG, 336x336) cannot be decoded",
    ),
    "drawing.eps": (
        lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "'drawing.eps' cannot be shown. A picture must be one of PNG, JPEG, WEBP, GIF, BMP, TIFF: got 47 bytes",
    ),
    "empty.png": (lambda whole: b"", "'empty.png' cannot be shown. A picture must be one of PNG"),
    "heavy.png": (
        lambda whole: whole + b"0" * 21_000_000,
        "'heavy.png' has 21 MB, more than 20. Make it smaller first.",
    ),
    "huge.png": (
        lambda whole: png_header(50_000, 50_000),
        "'huge.png' has too many pixels for this page. Make it smaller first.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_in_words_for_visitors(chat, scene, tmp_path, name):
    make, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(make(Path(scene["path"]).read_bytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        next(chat.answer("What is it?", {"path": str(path), "orig_name": name}))
    assert str(tmp_path) not in str(error.value)


def test_what_is_missing_is_named(chat, scene):
    with pytest.raises(ValueError, match="There is no question. Type one"):
        next(chat.answer(" \n", scene))
    with pytest.raises(ValueError, match="at most 2000 characters: got 2001. Shorten it."):
        next(chat.answer("a" * 2001, scene))
    with pytest.raises(ValueError, match="There is no picture. Upload one"):
        next(chat.answer("What is it?", None))


def test_the_instruction_is_the_question_whatever_it_says(chat, scene, monkeypatch):
    seen = {}
    monkeypatch.setattr(chat, "_stream", lambda inputs: seen.update(inputs) or iter(()))
    question = "What does ASSISTANT: mean here?"
    conversation = last(chat.answer(question, scene))
    assert conversation["marked"] == [(question, "instruction"), ("\n", None)]
    assert seen["instruction_input_ids"].tolist() == [
        encode_instruction(chat.processor.instruction_tokenizer, question)
    ]


def test_a_conversation_beyond_the_models_positions_is_refused(chat, scene):
    with pytest.raises(ValueError, match="longer than the model's 512 tokens. Start again."):
        # Each digit is a token.
        list(chat.answer("7" * 1000, scene))


def test_a_visitor_who_goes_away_ends_the_generation(chat, scene, monkeypatch):
    steps = []
    hook = chat.model.register_forward_pre_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(chat.model.generation_config, "eos_token_id", None)
    answers = chat.answer("Describe the picture.", scene)
    for _ in range(3):
        next(answers)
    answers.close()
    hook.remove()
    # It would have gone on for 300 tokens and more.
    assert 2 <= len(steps) < 200


def test_a_failure_while_generating_is_not_a_page_that_waits(chat, scene, monkeypatch):
    def failing(**kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(chat.model, "generate", failing)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(chat.answer("What is it?", scene))


def test_files_of_the_server_are_not_a_visitors(chat, scene):
    blocks = APP["serve"](chat, prevent_thread_lock=True, quiet=True)
    try:
        address = f"{blocks.local_url}gradio_api"

        def told(file: dict) -> str:
            called = httpx.post(f"{address}/call/ask", json={"data": ["Is there a heart?", file, None, "image"]})
            return httpx.get(f"{address}/call/ask/{called.json()['event_id']}", timeout=120).text

        mark = {"meta": {"_type": "gradio.FileData"}}
        for file in ({"path": scene["path"], **mark}, {"path": scene["path"]}):
            assert "event: error" in told(file)
            assert "assistant" not in told(file)
        with open(scene["path"], "rb") as picture:
            (path,) = httpx.post(f"{address}/upload", files={"files": picture}).json()
        assert "event: complete" in told({"path": path, **mark})
        assert "assistant" in told({"path": path, **mark})
    finally:
        blocks.close()


def test_the_command_line(capsys):
    with pytest.raises(SystemExit):
        APP["main"](["--max-new-tokens", "0"])
    assert "--max-new-tokens must be at least 1: got 0" in capsys.readouterr().err


@pytest.fixture
def browser():
    """Debian's Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="a visit needs playwright: `make test-app`")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("a visit needs Debian's `chromium`")
    api.expect.set_options(timeout=60_000)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


def screenshot(page, name: str, tmp_path: Path) -> None:
    """`EMMA_APP_SCREENSHOTS` names the folder where those of the documents lie."""
    page.screenshot(path=Path(os.environ.get("EMMA_APP_SCREENSHOTS", tmp_path)) / name)


# Pieces of words in a line of their own, as pairs: what stands before a line break that no space makes, and after it.
BROKEN_WORDS = """() => {
    const broken = [];
    const walker = document.createTreeWalker(document.querySelector(".gradio-container"), NodeFilter.SHOW_TEXT);
    const top = (node, index) => {
        const range = document.createRange();
        range.setStart(node, index);
        range.setEnd(node, index + 1);
        return range.getClientRects()[0]?.top;
    };
    while (walker.nextNode()) {
        const node = walker.currentNode, text = node.textContent;
        if (!node.parentElement.checkVisibility() || node.parentElement.closest("style, script, textarea")) continue;
        for (let index = 1; index < text.length; index++)
            if (/\\w/.test(text[index - 1]) && /\\w/.test(text[index]) && top(node, index) - top(node, index - 1) > 4)
                broken.push(text);
    }
    return broken;
}"""


@pytest.mark.slow
def test_a_visit_by_phone(chat, tmp_path, browser):
    """390 pixels wide: no message but one without a picture, the answer in sight, Stop while there is something to stop."""
    from playwright.sync_api import expect

    blocks = APP["serve"](chat, APP["TINY"], prevent_thread_lock=True, quiet=True)
    try:
        page = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2)
        page.set_default_timeout(60_000)
        page.goto(blocks.local_url)
        page.locator("#pictures button").first.wait_for()
        assert page.evaluate("window.scrollY") == 0
        expect(page.locator("#stop")).to_be_hidden()

        page.locator("#question textarea").fill("Describe the picture.")
        page.locator("#ask").click()
        expect(page.get_by_test_id("toast-body")).to_have_count(1)
        expect(page.get_by_test_id("toast-body")).to_contain_text("There is no picture. Upload one, or choose one")
        expect(page.get_by_text("Error", exact=True)).to_have_count(0)
        expect(page.locator("#stop")).to_be_hidden()
        page.get_by_test_id("toast-close").click()

        page.locator("#pictures button").first.click()
        page.locator("#picture img").wait_for()
        page.locator("#ask").click()
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#ask")).to_be_hidden()
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator("#ask")).to_be_visible()
        page.locator("#question textarea").fill("How many things are there?")
        page.locator("#ask").click()
        answer = page.locator("#talk [data-testid=bot]").nth(1)
        expect(answer).to_have_text("5")
        expect(answer).to_be_in_viewport(ratio=1)
        expect(page.locator("#question")).to_be_in_viewport(ratio=1)
        expect(page.locator("#picture img")).to_be_in_viewport(ratio=0.9)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(BROKEN_WORDS) == []
        expect(page.locator("#stop")).to_be_hidden()
        screenshot(page, "app-phone.png", tmp_path)
    finally:
        blocks.close()


@pytest.mark.slow
def test_a_visit(chat, tmp_path, browser):
    """Example picture, question, streamed answer, second question, broken file, no question."""
    from playwright.sync_api import expect

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    example = tmp_path / "example.png"
    draw(Scene.random(APP["EXAMPLE_SEEDS"][0]), 336).save(example)
    questions = ["Describe the picture.", "How many things are there?"]
    answers = [generated(chat, example, *questions[: count + 1]) for count in range(2)]

    blocks = APP["serve"](chat, APP["TINY"], prevent_thread_lock=True, quiet=True)
    try:
        page = browser.new_page(viewport={"width": 1240, "height": 800})
        page.set_default_timeout(60_000)
        page.goto(blocks.local_url)
        answered = page.locator("#talk [data-testid=bot]")
        asked = page.locator("#talk [data-testid=user]")

        page.locator("#pictures button").first.click()
        page.locator("#picture img").wait_for()
        page.evaluate(
            """() => { window.seen = []; new MutationObserver(() => {
                const bots = document.querySelectorAll("#talk [data-testid=bot]");
                if (bots.length) window.seen.push(bots[bots.length - 1].innerText.trim());
            }).observe(document.querySelector("#talk"), {subtree: true, childList: true, characterData: true}) }"""
        )
        page.locator("#question textarea").fill(questions[0])
        page.locator("#ask").click()
        expect(answered).to_have_text([answers[0]])
        seen = [text for text in page.evaluate("window.seen") if text]
        assert len(set(seen)) > 1
        assert all(answers[0].startswith(text) for text in seen)
        expect(page.locator("#question textarea")).to_have_value("")

        # The second by a button of the page and the Enter key.
        page.locator("#questions button", has_text=questions[1]).click()
        expect(page.locator("#question textarea")).to_have_value(questions[1])
        page.locator("#question textarea").press("Enter")
        expect(answered).to_have_text(answers)
        expect(asked).to_have_text(questions)
        expect(page.locator("#marked")).to_contain_text(f"{questions[0]} instruction")
        expect(page.locator("#stop")).to_be_hidden()
        screenshot(page, "app.png", tmp_path)

        page.locator("#show-moved input").check()
        expect(page.locator("#moved img")).to_have_count(2)
        expect(page.locator("#moved")).to_contain_text(f"\u201c{questions[0]}\u201d moves a visual token by")
        page.locator("#other textarea").fill("Is there a star?")
        page.locator("#other textarea").press("Enter")
        expect(page.locator("#moved")).to_contain_text("\u201cIs there a star?\u201d moves a visual token by")
        assert page.evaluate(BROKEN_WORDS) == []
        page.locator("#moved").scroll_into_view_if_needed()
        screenshot(page, "app-moved.png", tmp_path)
        page.locator("#show-moved input").uncheck()
        expect(page.locator("#moved")).to_be_hidden()

        page.locator("#ask").click()
        expect(page.get_by_test_id("toast-body")).to_contain_text("There is no question. Type one")
        page.get_by_test_id("toast-close").click()
        expect(answered).to_have_text(answers)

        page.locator("#picture").get_by_label("Remove Image").click()
        expect(answered).to_have_count(0)
        page.locator("#picture input[type=file]").set_input_files(broken)
        expect(page.get_by_test_id("toast-body")).to_contain_text(
            "'broken.png' cannot be shown. A picture must be one of PNG"
        )
        expect(page.locator("#picture img")).to_have_count(0)
        page.get_by_test_id("toast-close").click()

        # The page goes on.
        page.locator("#picture input[type=file]").set_input_files(example)
        page.locator("#picture img").wait_for()
        page.locator("#question textarea").fill(questions[1])
        page.locator("#ask").click()
        expect(answered).to_have_text([generated(chat, example, questions[1])])
    finally:
        blocks.close()
