"""Handler for Inference Endpoints: it lies beside the weights, loads them from there, and fetches nothing."""

import base64
import binascii
import os
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

# Generation parameters that a request may set: type, smallest and largest value. The other arguments of `generate` stay
# out of reach, because some of them load code.
PARAMETERS: dict[str, tuple[type, float, float]] = {
    "do_sample": (bool, 0, 1),
    "max_new_tokens": (int, 1, 4096),
    "num_beams": (int, 1, 16),
    "repetition_penalty": (float, 0.01, 10),
    "temperature": (float, 0.01, 10),
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
                `parameters` is a dictionary of some of `PARAMETERS`; by default the answer has at most 256 tokens.

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
        question = self._read_question(inputs)
        images = self._read_images(inputs)
        options = _read_parameters(data.get("parameters"))
        instruction = inputs.get("instruction")
        if instruction is not None and not isinstance(instruction, str):
            raise ValueError(f"`instruction` must be a text: got {type(instruction).__name__}.")

        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prepared = self.processor(images=images, text=prompt, instructions=instruction, return_tensors="pt").to(
            self.model.device, self.model.dtype
        )
        with torch.inference_mode():
            tokens = self.model.generate(**prepared, **options)[0, prepared["input_ids"].shape[1] :]
        return [{"generated_text": self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()}]

    def _read_question(self, inputs: dict[str, Any]) -> str:
        questions = [inputs[name] for name in ("question", "text") if inputs.get(name) is not None]
        if len(questions) != 1 or not isinstance(questions[0], str) or not questions[0].strip():
            raise ValueError(
                f"`inputs` must hold one question that is not empty, as `question` or `text`: got {questions!r:.80}."
            )
        return questions[0]

    def _read_images(self, inputs: dict[str, Any]) -> list[Image.Image]:
        image, images = inputs.get("image"), inputs.get("images")
        if image is not None and images is not None:
            raise ValueError("`inputs` must hold `image` or `images`: got both. Send all pictures in `images`.")
        if images is not None and not isinstance(images, (list, tuple)):
            raise ValueError(f"`images` must be a list of pictures: got {type(images).__name__}. Send one as `image`.")
        sent = images if images is not None else [image]
        if not sent or (image is None and images is None):
            raise ValueError("`inputs` must hold a picture, as `image` or in a list `images`: got none.")
        return [self._read_image(one) for one in sent]

    def _read_image(self, image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        if isinstance(image, str):
            image = _decode_image(image)
        if not isinstance(image, bytes):
            raise ValueError(f"A picture must be base64, a data URL, bytes or a picture: got {type(image).__name__}.")
        return self.processor.image_processor.fetch_images(image)


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
        options[name] = value
    return options


def _check_keys(name: str, values: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in set(values) - set(allowed))
    if unknown:
        raise ValueError(f"`{name}` knows {', '.join(allowed)}: got {', '.join(unknown)[:80]}. Leave that out.")
