"""What strangers may send: one place for the server, the chat page and the Ray example.

`hub/template/handler.py` runs without the package and has a copy, which a test holds equal.
"""

import math
from dataclasses import dataclass

# Formats of images on the web. Pillow reads many more, some of them by starting other programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# No token of a prompt is longer: a longer text cannot fit, and is refused before it costs time.
CHARACTERS_PER_POSITION = 64
# `stop` of a request: how many texts, and how long each of them. The time to prepare one grows with its length.
STOP_TEXTS = 4
STOP_CHARACTERS = 128
# Ranges of numbers in OpenAI's fields: type, smallest and largest value. Below the smallest temperature, which 0 may
# undercut (no sampling), the scores divided by it would overflow.
SMALLEST_TEMPERATURE = 1e-6
OPENAI_NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, math.inf),
    "max_completion_tokens": (int, 1, math.inf),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "seed": (int, -(2**63), 2**63 - 1),
}
# Generation parameters of a request to the handler: type, smallest and largest value.
HANDLER_PARAMETERS: dict[str, tuple[type, float, float]] = {
    "do_sample": (bool, 0, 1),
    "max_new_tokens": (int, 1, 4096),
    "num_beams": (int, 1, 16),
    "repetition_penalty": (float, 0.01, 10),
    "temperature": (float, SMALLEST_TEMPERATURE, 10),
    "top_k": (int, 1, 1_000_000),
    "top_p": (float, 0.01, 1),
}
# The chat page: megabytes of a file that Pillow gets to see, the size from which Gradio drops a file without a word to
# the visitor, and the length of a question.
PAGE_FILE_MEGABYTES = 20
PAGE_UPLOAD = "200mb"
PAGE_QUESTION_CHARACTERS = 2000


@dataclass(frozen=True)
class Limits:
    """Limits for one request, and for those that wait at once.

    Args:
        request_bytes: whole body, images included; also the sum of all images that are fetched for it.
        picture_pixels: width times height of each image.
        remote_pictures: fetch `http` and `https` URLs. Off, because a server that does can be made to reach what only
            it can reach.
        request_pixels: sum over all images.
        fetch_seconds: deadline for fetching all images, redirects included.
        waiting_bytes: sum over the bodies of all requests that were not answered yet, incomplete ones included.
        receive_seconds: deadline for receiving the whole body.
    """

    request_bytes: int = 32 * 2**20
    picture_pixels: int = 36_000_000
    remote_pictures: bool = False
    request_pixels: int = 72_000_000
    fetch_seconds: float = 10
    waiting_bytes: int = 256 * 2**20
    receive_seconds: float = 60
