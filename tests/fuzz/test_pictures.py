"""Images of any size and mode against the rule in plain numpy, and damaged files through every decoder."""

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.fuzzing import damage_bytes, fuzz

from emma_hf import EmmaImageProcessor
from emma_hf.hub.template import handler
from emma_hf.serving import Limits, RequestError
from emma_hf.serving.images import decode_image, open_image
from emma_hf.serving.limits import IMAGE_FORMATS

SIDE = 28
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]
LOSSLESS = {"PNG", "BMP", "TIFF"}


@pytest.fixture(scope="module")
def image_processor() -> EmmaImageProcessor:
    return EmmaImageProcessor(size=SIDE, crop_size=SIDE)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode if mode != "PA" else "P").convert(mode)


def expected_pixels(image: Image.Image) -> np.ndarray:
    """DESIGN's rule: RGB, a square of the mean color around it, bicubic, normalized."""
    rgb = image.convert("RGB")
    side = max(rgb.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in MEAN))
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    values = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    return ((values - MEAN) / STD).transpose(2, 0, 1)


SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90)) | st.tuples(st.integers(1, 3), st.integers(1, 2000))
LAYOUTS = ["image", "array", "tensor", "floats", "bytes"]


@fuzz(120)
@given(SIZES, st.booleans(), st.sampled_from(MODES), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_pixels_follow_the_rule(image_processor, size, is_turned, mode, layout, seed):
    image = noise(*(size[::-1] if is_turned else size), mode, seed)
    rgb = np.asarray(image.convert("RGB"))
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    given_image = {
        "image": image,
        "array": rgb,
        "tensor": torch.from_numpy(rgb.transpose(2, 0, 1).copy()),
        "floats": (rgb / 255).astype(np.float32),
        "bytes": file.getvalue(),
    }[layout]
    pixels = image_processor(given_image, return_tensors="np")["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], expected_pixels(image), atol=2e-5)


@fuzz(80)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from(["uint8", "uint16", "int64", "float32", "float64", "bool", "complex64"]),
    st.sampled_from([0, 1, 255, 256, 65535, -1, float("nan"), float("inf")]),
)
def test_an_array_is_an_image_or_refused(image_processor, shape, dtype, value):
    with np.errstate(invalid="ignore"):
        array = np.full(shape, value if "float" in dtype or np.isfinite(value) else 0).astype(dtype)
    channels = len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[-1] in (1, 3, 4))
    is_image = array.size > 0 and (len(shape) == 2 or channels) and dtype != "complex64"
    is_image &= dtype == "uint16" or (
        np.isfinite(array).all() and 0 <= array.min(initial=0).real <= array.max(initial=0).real <= 255
    )
    if len(shape) == 4:
        # Several images.
        is_image = False
    try:
        pixels = image_processor(array, return_tensors="np")["pixel_values"]
    except ValueError:
        assert not is_image
        return
    assert is_image or len(shape) == 4
    assert pixels.shape[1:] == (3, SIDE, SIDE)
    assert np.isfinite(pixels).all()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded_by_server(data: bytes) -> Image.Image:
    return decode_image(open_image(data, Limits(picture_pixels=4000)))


@fuzz(200)
@given(
    st.sampled_from([*IMAGE_FORMATS, "PPM", "ICO", "EPS", "PDF"]),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK"]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(0, 2**32),
)
def test_damaged_files_are_refused_or_what_they_were(image_processor, form, mode, size, turn, seed):
    image, exif = noise(*size, mode), Image.Exif()
    if turn:
        exif[0x0112] = turn
    try:
        data = encoded(image, form, exif=exif)
    except (OSError, ValueError):
        # This format has no such mode.
        return
    whole, data = data, data if seed is None else damage_bytes(data, random.Random(seed))
    try:
        at_server = decoded_by_server(data)
    except RequestError as error:
        assert error.status in (400, 413)
        assert seed is not None or form not in IMAGE_FORMATS or size[0] * size[1] > 4000
        at_server = None
    else:
        assert at_server.width * at_server.height <= 4000
        assert form in IMAGE_FORMATS
    try:
        (at_handler,) = handler._read_images({"image": data}, 1)
    except ValueError:
        at_handler = None
    try:
        pixels = image_processor(data, return_tensors="np")["pixel_values"]
    except ValueError:
        pixels = None
    if at_server is not None:
        # All decoders read the same picture.
        np.testing.assert_array_equal(np.asarray(at_server.convert("RGB")), np.asarray(at_handler.convert("RGB")))
        np.testing.assert_allclose(pixels[0], expected_pixels(at_server), atol=2e-5)
    elif at_handler is not None:
        # It has the package's default limit.
        assert at_handler.width * at_handler.height > 4000
    # Nothing is made up for what was cut off.
    if at_server is not None and whole.startswith(data) and form in LOSSLESS:
        np.testing.assert_array_equal(np.asarray(at_server), np.asarray(decoded_by_server(whole)))
