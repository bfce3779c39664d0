"""A chat page about a picture, for a browser or a Space: streamed answers, and which words guided the picture.

    python examples/app.py --model emma-7b

A Space runs it as it is. `EMMA_MODEL` names the model where `--model` does not; without either it is emma-tiny, which
ships with the package. Where the page is served is told to Gradio: `GRADIO_SERVER_NAME`, `GRADIO_SERVER_PORT`.
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import TextIteratorStreamer

from emma_hf import EMMA_TINY
from emma_hf.analysis import VisionPath
from emma_hf.analysis.contributions import question_map
from emma_hf.inference import load_model
from emma_hf.model.instruction_emma import encode_instruction, instructions_from_messages
from emma_hf.serving import Limits, RequestError
from emma_hf.serving.images import decode_image, open_image
from emma_hf.serving.limits import PAGE_FILE_MEGABYTES, PAGE_QUESTION_CHARACTERS, PAGE_UPLOAD
from emma_hf.tiny.drawing import draw
from emma_hf.tiny.scenes import Scene

# Scenes in which emma-tiny has something to tell apart.
EXAMPLE_SEEDS = (0, 3, 9, 14, 20, 27, 31, 45)
EXAMPLE_QUESTIONS = (
    "How many things are there?",
    "Is there a heart?",
    "What colour is the star?",
    "Describe the picture.",
)
# Width and height of a picture that shows what a question moved, and how bright it stays where nothing moved.
MOVED_SIDE, DIMMED = 336, 0.4
# HTTP's status for what has too many bytes or pixels.
TOO_LARGE = 413

TITLE = "Ask EMMA about a picture"
INTRODUCTION = f"""# {TITLE}
EMMA reads the picture *for the question*: the words marked below the conversation are mixed into the visual tokens
before the language model sees them."""
TINY = "This is **emma-tiny**, a small model that knows drawn shapes and nothing else."
CSS = """
.gradio-container {max-width: 1120px !important; margin: auto !important}
#introduction h1 {margin: 0.2em 0}
#entry {flex-wrap: nowrap}
#entry button, #questions button {white-space: nowrap}
#marked * {word-break: normal; overflow-wrap: break-word}
/* A phone shows image, conversation and question at once, and the choice that few make at the end. */
@media (max-width: 640px) {
    #introduction h1 {font-size: 1.3em}
    #introduction p {font-size: 0.85em; line-height: 1.35}
    #page {flex-direction: column; gap: 8px !important}
    #page > div {display: contents}
    #turn, :has(> #turn) {order: 1}
    #picture {height: 190px !important; min-height: 0 !important}
    #pictures .gallery {gap: 5px}
    #pictures .gallery-item, #pictures .gallery .container {width: 35px; height: 35px}
    #pictures .label {display: none}
    #talk {height: 270px !important}
}
"""
# The conversation is where the visitor looks next, wherever the page was scrolled to.
SHOW_TALK = "() => document.querySelector('#talk').scrollIntoView({block: 'nearest'})"


class Chat:
    """One model, and what the page asks of it. A conversation is a dictionary: its `picture`, its `messages`, the
    `instruction` that guided the picture, and the user's words as `marked` pieces, those with the label `"instruction"`
    being as much of it as the instruction encoder reads.
    """

    def __init__(self, name: str | os.PathLike, max_new_tokens: int = 512) -> None:
        self.model, self.processor = load_model(name)
        self.max_new_tokens = max_new_tokens

    def read(self, picture: dict[str, Any]) -> Image.Image:
        """The picture of an uploaded file, `{"path": …, "orig_name": …}`.

        Raises:
            ValueError: not a picture, a broken or an enormous one; the message is for the person who chose it.
        """
        path, name = picture["path"], picture.get("orig_name") or "The file"
        megabytes = os.path.getsize(path) / 1e6
        if megabytes > PAGE_FILE_MEGABYTES:
            raise ValueError(
                f"{name!r} has {megabytes:.0f} MB, more than {PAGE_FILE_MEGABYTES}. Make it smaller first."
            )
        try:
            # Where the server keeps the file is nobody's business, and is not in these errors.
            return decode_image(open_image(path, Limits()))
        except RequestError as error:
            if error.status == TOO_LARGE:
                raise ValueError(f"{name!r} has too many pixels for this page. Make it smaller first.") from error
            raise ValueError(f"{name!r} cannot be shown. {error}") from error

    def answer(
        self,
        question: str,
        picture: dict[str, Any] | None,
        conversation: dict[str, Any] | None = None,
        turn: str = "image",
    ) -> Iterator[dict[str, Any]]:
        """Ask, and yield the conversation each time that its answer has grown.

        Args:
            question: what is asked.
            picture: the file that is shown; another one than before begins a new conversation.
            conversation: what was said so far.
            turn: whose words guide the picture, `"image"` (the first question) or `"last"`.

        Raises:
            ValueError: no question or too long a one, no picture or a bad one, or a conversation too long for the
                model.
        """
        if not question.strip():
            raise ValueError("There is no question. Type one, or choose one of those below.")
        check_length(question)
        if picture is None:
            raise ValueError("There is no picture. Upload one, or choose one of the examples.")
        image = self.read(picture)
        same = conversation is not None and conversation["picture"] == picture["path"]
        messages = list(conversation["messages"]) if conversation and same else []
        content = [{"type": "text", "text": question.strip()}]
        messages.append({"role": "user", "content": content if messages else [{"type": "image"}, *content]})
        instructions = instructions_from_messages(messages, self.processor.image_token, turn)
        marked = self._marked(messages, instructions[0], turn)
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=[image], text=prompt, instructions=instructions, return_tensors="pt")

        def so_far(text: str) -> dict[str, Any]:
            answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            return {
                "picture": picture["path"],
                "messages": [*messages, answer],
                "instruction": instructions[0],
                "marked": marked,
            }

        text = ""
        yield so_far(text)
        for words in self._stream(inputs.to(self.model.device, self.model.dtype)):
            text += words
            yield so_far(text.strip())

    def moved(self, picture: dict[str, Any], instruction: str, other: str) -> list[tuple[Image.Image, str]]:
        """Where an instruction moved the visual tokens of a picture, and where another one would have.

        A token is moved from its mean over both instructions and the page's own questions.

        Args:
            picture: the file that is shown.
            instruction: what guided the picture.
            other: another question.

        Returns:
            The picture as the model sees it, bright where its tokens moved, and how far; for each instruction. Both are
            drawn to one scale.

        Raises:
            ValueError: a bad picture.
        """
        pixels = self.processor.image_processor([self.read(picture)], return_tensors="pt")["pixel_values"]
        path = self._vision_path
        with torch.no_grad():
            features = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype)).float()[0]
        tokens = path.instruction_tokens(path.instruction_ids([instruction, other, *EXAMPLE_QUESTIONS]))
        lengths = path.project(path.fuse(features, tokens[0])).norm(dim=-1)
        maps = torch.stack([question_map(path, features, words, tokens) / lengths for words in tokens[:2]])
        maps = maps[:, int(path.has_class_token) :].cpu()
        scale = maps.max().clamp(min=1e-12)
        return [
            (
                self._dimmed(pixels[0], shares / scale),
                f"\u201c{text}\u201d moves a visual token by {shares.mean():.1%} of its length, by {shares.max():.1%} "
                "at most",
            )
            for text, shares in zip((instruction, other), maps)
        ]

    @cached_property
    def _vision_path(self) -> VisionPath:
        return VisionPath(self.model, self.processor)

    def _dimmed(self, pixels: torch.Tensor, brightness: torch.Tensor) -> Image.Image:
        """The picture of pixels (3, height, width), each patch as bright as `brightness` (patches,), 0 to 1, says."""
        mean, std = (
            torch.tensor(getattr(self.processor.image_processor, name))[:, None, None]
            for name in ("image_mean", "image_std")
        )
        side = round(len(brightness) ** 0.5)
        light = torch.nn.functional.interpolate(
            brightness.reshape(1, 1, side, side), size=pixels.shape[1:], mode="nearest"
        )[0]
        colors = (pixels * std + mean).clamp(0, 1) * (DIMMED + (1 - DIMMED) * light)
        image = Image.fromarray((255 * colors).round().to(torch.uint8).permute(1, 2, 0).numpy())
        return image.resize((MOVED_SIDE, MOVED_SIDE), Image.Resampling.NEAREST)

    def _stream(self, inputs: Any) -> Iterator[str]:
        positions = self.model.config.position_count
        room = positions - inputs["input_ids"].shape[1]
        if room < 1:
            raise ValueError(f"The conversation is longer than the model's {positions} tokens. Start again.")
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        left = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(
                self.model.generate,
                **inputs,
                max_new_tokens=min(self.max_new_tokens, room),
                do_sample=False,
                streamer=streamer,
                stopping_criteria=[lambda *_: left.is_set()],
            )
            # Also where it fails, or nobody would end the loop.
            generation.add_done_callback(lambda _: streamer.end())
            try:
                yield from streamer
                generation.result()
            finally:
                # A visitor who stops it, or goes away, ends the loop early.
                left.set()

    def _marked(self, messages: list[dict[str, Any]], instruction: str, turn: str) -> list[tuple[str, str | None]]:
        turns = [message["content"][-1]["text"] for message in messages if message["role"] == "user"]
        guide = 0 if turn == "image" else len(turns) - 1
        start = max(turns[guide].find(instruction), 0)
        end = start + self._length_read(instruction)
        pieces: list[tuple[str, str | None]] = [(f"{text}\n", None) for text in turns]
        split = (turns[guide][:start], None), (turns[guide][start:end], "instruction"), (pieces[guide][0][end:], None)
        pieces[guide : guide + 1] = [piece for piece in split if piece[0]]
        return pieces

    def _length_read(self, instruction: str) -> int:
        """How many of its letters fit into the instruction encoder, in whole words."""
        tokenizer, length = self.processor.instruction_tokenizer, self.processor.instruction_length
        whole = encode_instruction(tokenizer, instruction, length)
        ends = [index for index in range(1, len(instruction)) if instruction[index].isspace()]
        fitting = (end for end in ends if encode_instruction(tokenizer, instruction[:end], length) == whole)
        return next(fitting, len(instruction))


def check_length(question: str) -> None:
    """Refuse a question that a browser would not have let through.

    Raises:
        ValueError: too many characters.
    """
    if len(question) > PAGE_QUESTION_CHARACTERS:
        raise ValueError(
            f"A question must have at most {PAGE_QUESTION_CHARACTERS} characters: got {len(question)}. Shorten it."
        )


def check_uploaded(picture: dict[str, Any] | None) -> None:
    """Refuse a path that a client made up. Gradio itself looks only at files that are marked as files.

    Raises:
        ValueError: a file of the server that no visitor uploaded and that is no example.
    """
    if picture is not None and not Path(picture["path"]).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("There is no such picture on this page. Upload it.")


def compare(
    chat: Chat, shown: bool, picture: dict[str, Any] | None, conversation: dict[str, Any] | None, other: str
) -> list[Any]:
    """What the panel shows: two pictures and the words about them, or nothing where nothing was asked yet."""
    try:
        check_uploaded(picture)
        if not shown or picture is None or conversation is None or not other.strip():
            return [None, None, ""]
        check_length(other)
        (first, about_first), (second, about_second) = chat.moved(picture, conversation["instruction"], other.strip())
        return [first, second, f"Left: {about_first}. Right: {about_second}."]
    except ValueError as error:
        gr.Warning(str(error))
        return [gr.skip()] * 3


def _moved_panel() -> tuple[gr.Checkbox, gr.Textbox, list[Any]]:
    """The switch that shows where questions moved the picture, the other question, and what [`compare`] fills."""
    shown = gr.Checkbox(label="Show where the question moved the picture", elem_id="show-moved")
    with gr.Column(visible=False, elem_id="moved") as panel:
        other = gr.Textbox(
            EXAMPLE_QUESTIONS[1], label="Beside it, where this question would have", elem_id="other", max_lines=2,
            max_length=PAGE_QUESTION_CHARACTERS,
        )  # fmt: skip
        with gr.Row():
            pictures = [
                gr.Image(show_label=False, container=False, interactive=False, buttons=[], format="png", min_width=120)
                for _ in range(2)
            ]
        about = gr.Markdown()
    shown.change(lambda on: gr.update(visible=on), shown, panel, show_progress="hidden", api_name=False)
    return shown, other, [*pictures, about]


def page(chat: Chat, note: str = "") -> gr.Blocks:
    """The page of a model, not yet served."""
    folder = Path(tempfile.mkdtemp(prefix="emma-examples-"))
    examples = [folder / f"scene-{seed}.png" for seed in EXAMPLE_SEEDS]
    for seed, path in zip(EXAMPLE_SEEDS, examples):
        draw(Scene.random(seed), 336).save(path)

    def ask(question, picture, conversation, turn):
        try:
            check_uploaded(picture)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        try:
            for grown in chat.answer(question, picture, conversation, turn):
                yield "", _shown(grown), grown["marked"], grown, *running
        except ValueError as error:
            # An error would also be written into each part of the page.
            gr.Warning(str(error))
            yield [gr.skip()] * 6

    def check(picture):
        try:
            check_uploaded(picture)
            if picture is not None:
                chat.read(picture)
        except ValueError as error:
            gr.Warning(str(error), duration=None)
            return None
        return gr.skip()

    def begin(picture, conversation):
        kept = picture is not None and conversation is not None and picture["path"] == conversation["picture"]
        return [gr.skip()] * 3 if kept else ([], [], None)

    # Of the buttons Ask and Stop, the one that can do something.
    running = gr.update(visible=False), gr.update(visible=True)
    idle = gr.update(visible=True), gr.update(visible=False)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        conversation = gr.State()
        gr.Markdown(f"{INTRODUCTION} {note}", elem_id="introduction")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=2, min_width=300):
                # The file itself is read, by the processor: what Gradio makes of a broken one says little.
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=330,
                    elem_id="picture", buttons=[],
                )  # fmt: skip
                gr.Examples([[str(path)] for path in examples], picture, label="Example pictures", elem_id="pictures")
                turn = gr.Radio(
                    [("first question", "image"), ("latest question", "last")], value=chat.processor.instruction_turn,
                    label="The picture is read for", elem_id="turn",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=360):
                talk = gr.Chatbot(
                    label="Conversation", height=330, elem_id="talk", buttons=[], latex_delimiters=[],
                    placeholder="Choose a picture, then ask about it.",
                )  # fmt: skip
                with gr.Row(equal_height=True, elem_id="entry"):
                    # Not focused at first: that would scroll a phone past the picture.
                    question = gr.Textbox(
                        placeholder="Ask about the picture", show_label=False, container=False, scale=6, max_lines=4,
                        max_length=PAGE_QUESTION_CHARACTERS, min_width=120, elem_id="question",
                    )  # fmt: skip
                    send = gr.Button("Ask", variant="primary", scale=1, min_width=70, elem_id="ask")
                    stop = gr.Button("Stop", scale=1, min_width=70, elem_id="stop", visible=False)
                gr.Examples([[text] for text in EXAMPLE_QUESTIONS], question, label="Questions", elem_id="questions")
                marked = gr.HighlightedText(
                    label="What guided the picture", color_map={"instruction": "green"}, elem_id="marked",
                    combine_adjacent=True, show_whitespaces=False,
                )  # fmt: skip
                shown, other, moved = _moved_panel()
        buttons = [send, stop]
        asking = gr.on(
            [question.submit, send.click], ask, [question, picture, conversation, turn],
            [question, talk, marked, conversation, *buttons], preprocess=False, show_progress="hidden", api_name="ask",
        )  # fmt: skip
        gr.on([question.submit, send.click], None, js=SHOW_TALK, api_name=False)
        # Also after an error.
        asking.then(lambda: idle, None, buttons, show_progress="hidden", api_name=False)
        comparison = [shown, picture, conversation, other]
        stop.click(lambda: idle, None, buttons, cancels=[asking], show_progress="hidden", api_name=False)
        picture.input(check, picture, picture, preprocess=False, show_progress="hidden", api_name="check")
        parts = [talk, marked, conversation]
        changed = picture.change(
            begin, [picture, conversation], parts, preprocess=False, show_progress="hidden", api_name=False
        )
        cleared = talk.clear(lambda: ([], [], None), None, parts, api_name=False)
        for event in (asking.then, changed.then, cleared.then, shown.change, other.submit, other.blur):
            event(partial(compare, chat), comparison, moved, preprocess=False, show_progress="hidden", api_name=False)
    return blocks


def serve(chat: Chat, note: str = "", **options: Any) -> gr.Blocks:
    """Serve the page of a model; `options` are those of `Blocks.launch`."""
    blocks = page(chat, note)
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="emerald", font=font, font_mono=["monospace"])
    blocks.launch(theme=theme, css=CSS, max_file_size=PAGE_UPLOAD, footer_links=["api"], **options)
    return blocks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A chat page about a picture.")
    parser.add_argument(
        "--model",
        default=os.environ.get("EMMA_MODEL", str(EMMA_TINY)),
        help="folder or Hub id (default: what EMMA_MODEL names, or else emma-tiny)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1: got {args.max_new_tokens}")
    serve(Chat(args.model, args.max_new_tokens), note=TINY if args.model == str(EMMA_TINY) else "")


def _shown(conversation: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": message["role"], "content": message["content"][-1]["text"]} for message in conversation["messages"]
    ]


if __name__ == "__main__":
    main()
