"""Images of strangers: where they may lie, and what is checked before one is decoded."""

import base64
import binascii
import reprlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import RequestError
from .fetching import fetch
from .limits import IMAGE_FORMATS, Limits

# Deep and long values are cut before they are rendered.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def read_urls(urls: list[str], limits: Limits) -> list[bytes]:
    """The encoded images at data URLs, and where `limits` allow it at `http` and `https` URLs, within one deadline.

    Raises:
        RequestError: another kind of URL, no base64, an address that gives nothing in time.
    """
    deadline = time.monotonic() + limits.fetch_seconds
    left = limits.request_bytes
    images = []
    for number, url in enumerate(urls, start=1):
        with image_number_in_errors(number, len(urls)):
            if url[:5].lower() == "data:":
                images.append(_decode_data_url(url))
            elif not url.lower().startswith(("http://", "https://")):
                # Whatever else it is, a path of this machine for example, is nothing that a client may open.
                raise RequestError(f"A picture must be a data URL (data:image/png;base64,…): got {shown(url)}.")
            elif not limits.remote_pictures:
                raise RequestError(
                    f"This server fetches no pictures: got {shown(url)}. Send it as a data URL "
                    "(data:image/png;base64,…)."
                )
            else:
                images.append(_fetch_image(url, left, deadline, limits))
                left -= len(images[-1])
    return images


def open_images(sources: list[bytes], limits: Limits) -> list[Image.Image]:
    """Open encoded images and check their formats and sizes, also of all together. Nothing is decoded yet.

    Raises:
        RequestError: see `open_image`; or too many pixels together.
    """
    images, pixels = [], 0
    for number, source in enumerate(sources, start=1):
        with image_number_in_errors(number, len(sources)):
            images.append(open_image(source, limits))
            pixels += images[-1].width * images[-1].height
            if pixels > limits.request_pixels:
                raise RequestError(
                    f"The pictures of a request may have at most {limits.request_pixels} pixels together: got {pixels} "
                    "up to this one. Make them smaller first.",
                    413,
                )
    return images


def open_image(source: bytes | str | Path, limits: Limits) -> Image.Image:
    """Open an image and check its format and size. It is not decoded yet.

    Args:
        source: the bytes of a file, or its path.
        limits: `picture_pixels` is the limit for its width times its height.

    Raises:
        RequestError: a format that is not one of `IMAGE_FORMATS`, too many pixels, a file that is broken.
        OSError: a path that cannot be read.
    """
    stream = BytesIO(source) if isinstance(source, bytes) else source
    length = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    try:
        image = Image.open(stream, formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        formats = ", ".join(IMAGE_FORMATS)
        raise RequestError(f"A picture must be one of {formats}: got {length} bytes of something else.") from error
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"A picture may have at most {limits.picture_pixels} pixels: {error}. Make it smaller first.", 413
        ) from error
    except Exception as error:
        raise _broken(f"{length} bytes", error) from error
    if image.width * image.height > limits.picture_pixels:
        raise RequestError(
            f"A picture may have at most {limits.picture_pixels} pixels: got {image.width}x{image.height}. "
            "Make it smaller first.",
            413,
        )
    return image


def decode_image(image: Image.Image) -> Image.Image:
    """Decode an image that `open_image` opened, turn it upright, and return it.

    Raises:
        RequestError: a broken file.
    """
    what = f"{image.format}, {image.width}x{image.height}"
    try:
        image.load()
        # Large images are not copied where nothing is to be turned.
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:
        raise _broken(what, error) from error


@contextmanager
def image_number_in_errors(number: int, count: int) -> Iterator[None]:
    """Add to an error which of several images it is about, counted from 1."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        message = f"Picture {number} of {count}: {error}"
        raise RequestError(message, error.status, error.code, error.param) from error


def shown(value: Any, length: int = 60) -> str:
    """The beginning of what a client sent, for an error message."""
    text = _SHORT.repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def _decode_data_url(url: str) -> bytes:
    header, comma, encoded = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RequestError(f"A data URL must begin like data:image/png;base64, got {shown(url)}.")
    try:
        # Many encoders break lines.
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"The data URL of a picture must hold base64: got {shown(url)} ({error}).") from error


def _fetch_image(url: str, max_bytes: int, deadline: float, limits: Limits) -> bytes:
    try:
        data = fetch(url, max_bytes, deadline)
    except TimeoutError as error:
        raise RequestError(
            f"The pictures of a request must arrive within {limits.fetch_seconds:g} seconds: {shown(url)} took longer."
        ) from error
    except (OSError, ValueError, HTTPException) as error:
        raise RequestError(f"The picture at {shown(url)} cannot be fetched ({error}).") from error
    if len(data) > max_bytes:
        raise RequestError(f"A picture may have at most {max_bytes} bytes: got more from {shown(url)}.", 413)
    return data


def _broken(what: str, error: Exception) -> RequestError:
    # Decoders fail in many ways on broken files; all of them mean the same here.
    return RequestError(f"The picture ({what}) cannot be decoded ({error}). Is it complete?")
