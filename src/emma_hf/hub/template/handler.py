"""Handler for Inference Endpoints: it lies beside the weights, loads them from there, and fetches nothing."""

import base64
import binascii
import os
from io import BytesIO
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor

# These limits are those of `emma_hf.serving.limits`: this file runs alone, and a test of the package holds them equal.
# Pillow reads many more formats, some of them by starting other programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
REQUEST_BYTES = 32 * 2**20
PICTURE_PIXELS = 36_000_000
REQUEST_PIXELS = 72_000_000
CHARACTERS_PER_POSITION = 64
# Generation parameters that a request may set: type, smallest and largest value. The other arguments of `generate` stay
# out of reach, because some of them load code.
PARAMETERS: dict[str, tuple[type, float, float]] = {
    "do_sample": (bool, 0, 1),
    "max_new_tokens": (int, 1, 4096),
    "num_beams": (int, 1, 16),
    "repetition_penalty": (float, 0.01, 10),
    "temperature": (float, 1e-6, 10),
    "top_k": (int, 1, 1_000_000),
    "top_p": (float, 0.01, 1),
}
INPUTS = ("image", "images", "instruction", "question", "text")


class EndpointHandler:
    """Answers questions about images: `EndpointHandler(model_dir)({"inputs": {"image": ..., "question": ...}})`.

    Args:
        model_dir: folder of the repository: weights, processor and code files.
    """

    def __init__(self, model_dir: str | os.PathLike = "") -> None:
        folder = os.fspath(model_dir) or os.path.dirname(os.path.abspath(__file__))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        self.processor = AutoProcessor.from_pretrained(folder, **options)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
        # Quantized weights are placed on their device while they are read.
        self.model = (model if getattr(model, "is_quantized", False) else model.to(device)).eval()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]]:
        """Answer one request.

        Args:
            data: `inputs` is a dictionary with `question` (or `text`), and `image` or a list `images`: base64, a data
                URL, bytes or a PIL image. Its `instruction` guides the visual tokens in place of the question.
                `parameters` is a dictionary of some of `PARAMETERS`; by default the answer has at most 256 tokens,
                and never more than the model's context has room for.

        Returns:
            `[{"generated_text": answer}]`, as the pipeline of this task does.

        Raises:
            ValueError: a malformed request. The endpoint replies with status 400 and this text as its `error`.
        """
        if not isinstance(data, dict):
            raise ValueError(f"A request must be a dictionary with `inputs`: got {type(data).__name__}.")
        inputs = data.get("inputs")
        if not isinstance(inputs, dict):
            raise ValueError(
                f"`inputs` must be a dictionary with `image` and `question`: got {type(inputs).__name__}. Send "
                '{"inputs": {"image": "<base64>", "question": "..."}}.'
            )
        _check_keys("inputs", inputs, INPUTS)
        positions = self.model.config.position_count
        question = _read_question(inputs, positions * CHARACTERS_PER_POSITION)
        instruction = inputs.get("instruction")
        if instruction is not None:
            _check_text("instruction", instruction, positions * CHARACTERS_PER_POSITION)
        options = _read_parameters(data.get("parameters"))
        images = _read_images(inputs, (positions - 1) // self.processor.image_seq_length)

        # The instruction comes from the message itself: in a rendered prompt, a word of it could pass for a role.
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        prepared = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            instructions=instruction,
        ).to(self.model.device, self.model.dtype)
        length = prepared["input_ids"].shape[1]
        if length >= positions:
            raise ValueError(
                f"This model's maximum context length is {positions} tokens. A prompt must leave room for an answer: "
                f"got {length} tokens. Shorten it, or send fewer pictures."
            )
        options["max_new_tokens"] = min(options["max_new_tokens"], positions - length)
        with torch.inference_mode():
            tokens = self.model.generate(**prepared, **options)[0, length:]
        return [{"generated_text": self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()}]


def _read_question(inputs: dict[str, Any], max_characters: int) -> str:
    questions = [inputs[name] for name in ("question", "text") if inputs.get(name) is not None]
    if len(questions) != 1 or not isinstance(questions[0], str) or not questions[0].strip():
        raise ValueError(
            f"`inputs` must hold one question that is not empty, as `question` or `text`: got {questions!r:.80}."
        )
    _check_text("question", questions[0], max_characters)
    return questions[0]


def _check_text(name: str, text: Any, max_characters: int) -> None:
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a text: got {type(text).__name__}.")
    if len(text) > max_characters:
        raise ValueError(f"`{name}` may have at most {max_characters} characters: got {len(text)}. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` must be valid Unicode: got half a character at position {error.start}.") from error


def _read_images(inputs: dict[str, Any], max_images: int) -> list[Image.Image]:
    image, images = inputs.get("image"), inputs.get("images")
    if image is not None and images is not None:
        raise ValueError("`inputs` must hold `image` or `images`: got both. Send all pictures in `images`.")
    if images is not None and not isinstance(images, (list, tuple)):
        raise ValueError(f"`images` must be a list of pictures: got {type(images).__name__}. Send one as `image`.")
    sent = images if images is not None else [image]
    if not sent or (image is None and images is None):
        raise ValueError("`inputs` must hold a picture, as `image` or in a list `images`: got none.")
    if len(sent) > max_images:
        raise ValueError(f"The model's context has room for at most {max_images} pictures: got {len(sent)}.")
    encoded = [_decode_image(one) if isinstance(one, str) else one for one in sent]
    total = sum(len(one) for one in encoded if isinstance(one, bytes))
    if total > REQUEST_BYTES:
        raise ValueError(f"The pictures of a request may have at most {REQUEST_BYTES} bytes: got {total}.")
    # Before any of them is decoded.
    opened = [_open_image(one) for one in encoded]
    pixels = sum(one.width * one.height for one in opened)
    if pixels > REQUEST_PIXELS:
        raise ValueError(f"The pictures of a request may have at most {REQUEST_PIXELS} pixels together: got {pixels}.")
    return [_load_image(one) if isinstance(sent, bytes) else one for one, sent in zip(opened, encoded)]


def _open_image(image: Any) -> Image.Image:
    """An image whose format and size were checked, not yet decoded."""
    if isinstance(image, bytes):
        try:
            image = Image.open(BytesIO(image), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"A picture must be one of {', '.join(IMAGE_FORMATS)}: got {len(image)} bytes of something else."
            ) from error
        except Exception as error:
            raise ValueError(f"The picture ({len(image)} bytes) cannot be opened ({error}). Is it complete?") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"A picture must be base64, a data URL, bytes or a picture: got {type(image).__name__}.")
    if image.width * image.height > PICTURE_PIXELS:
        raise ValueError(
            f"A picture may have at most {PICTURE_PIXELS} pixels: got {image.width}x{image.height}. Make it smaller "
            "first."
        )
    return image


def _load_image(image: Image.Image) -> Image.Image:
    """The pixels, upright."""
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    # Decoders fail in many ways on broken files.
    except Exception as error:
        raise ValueError(f"The picture ({image.format}) cannot be decoded ({error}). Is it complete?") from error


def _decode_image(text: str) -> bytes:
    if text.lstrip()[:5].lower() in ("http:", "https", "file:"):
        raise ValueError(
            f"A picture must come inside the request, as base64 or a data URL: got {text.strip()[:60]!r}. This "
            "endpoint opens no address."
        )
    # The head of a data URL ends at its comma; base64 contains no comma.
    body = text.rpartition(",")[2]
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"A picture that is a text must be base64 or a data URL: got {text[:40]!r} ({error})."
        ) from error


def _read_parameters(values: Any) -> dict[str, Any]:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"`parameters` must be a dictionary: got {type(values).__name__}.")
    _check_keys("parameters", values, tuple(PARAMETERS))
    options: dict[str, Any] = {"max_new_tokens": 256, "do_sample": False}
    for name, value in values.items():
        if value is None:
            continue
        kind, low, high = PARAMETERS[name]
        is_kind = isinstance(value, bool) if kind is bool else not isinstance(value, bool)
        if kind is not bool:
            is_kind = is_kind and isinstance(value, int if kind is int else (int, float))
        # `not low <= value <= high` is also true of NaN.
        if not is_kind or not low <= value <= high:
            wanted = "true or false" if kind is bool else f"a number ({kind.__name__}) from {low} to {high}"
            raise ValueError(f"`{name}` must be {wanted}: got {value!r:.40}.")
        # JSON has one kind of number, and `generate` refuses a whole number as a temperature.
        options[name] = kind(value)
    return options


def _check_keys(name: str, values: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in set(values) - set(allowed))
    if unknown:
        raise ValueError(f"`{name}` knows {', '.join(allowed)}: got {', '.join(unknown)[:80]}. Leave that out.")
