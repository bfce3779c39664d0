"""Pixels against the recorded ones and against plain Pillow, from every kind of input."""

import base64
import functools
import http.server
import io
import logging
import shutil
import threading

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from support.processes import run_python

from emma_hf import EmmaImageProcessor
from emma_hf.model.image_processing_emma import _pad_and_resize

SMALL = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def small():
    return EmmaImageProcessor(**SMALL)


def pixels(processor, image, **kwargs):
    return processor(image, return_tensors="np", **kwargs)["pixel_values"][0]


def as_bytes(image, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **kwargs})
    return buffer.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(image: Image.Image, side: int = 28) -> np.ndarray:
    """Pad, resize and normalise, written out."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), tuple(int(value * 255) for value in MEAN))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    values = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return ((values - MEAN) / STD).transpose(2, 0, 1)


# Against the recorded pixels


@pytest.mark.parametrize("as_pil", [False, True])
def test_recorded_pixels(reference, as_pil):
    recorded = load_file(reference / "pixel_values.safetensors")
    assert len(recorded) == 20
    for key, expected in recorded.items():
        if key == "tall_gray.png|none" and int(PIL.__version__.split(".")[0]) < 13:
            # Pillow 13 resizes some tall pictures columns first; these pixels were recorded so. Squares are not touched.
            continue
        name, aspect, *view = key.split("|")
        path = reference / "images" / name
        image = Image.open(path) if as_pil else path
        processor = EmmaImageProcessor() if aspect == "pad336" else EmmaImageProcessor(do_pad=aspect == "pad", **SMALL)
        actual = pixels(processor, image)
        actual = {"stride7": actual[:, ::7, ::7], "rowmean": actual.mean(-1)}[view[0]] if view else actual
        assert np.abs(actual - expected).max() < 1e-5, key


@pytest.mark.parametrize(
    "size", [(50, 80), (80, 50), (3, 700), (700, 3), (1, 1), (1, 3), (3, 1), (31, 31), (2000, 1500)]
)
def test_pixels_equal_those_of_the_whole_square(size):
    image = Image.fromarray(noise(size[1], size[0]))
    actual = pixels(EmmaImageProcessor(), image)
    assert np.abs(actual - plain(image, 336)).max() < 1e-5


def test_a_tall_picture_in_many_strips_equals_the_whole_square(monkeypatch):
    from emma_hf.model import image_processing_emma

    image = Image.fromarray(noise(301, 100))
    expected = _pad_and_resize(image, (28, 28), 3, (1, 2, 3))
    monkeypatch.setattr(image_processing_emma, "STRIP_PIXELS", 301 * 7)
    assert np.array_equal(np.asarray(_pad_and_resize(image, (28, 28), 3, (1, 2, 3))), np.asarray(expected))
    square = Image.new("RGB", (301, 301), (1, 2, 3))
    square.paste(image, (100, 0))
    assert np.array_equal(np.asarray(square.resize((28, 28), 3)), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_very_long_pictures_need_no_square_in_memory(size):
    values = pixels(EmmaImageProcessor(), Image.new("RGB", size, (255, 0, 0)))
    # All of the square but a hair's breadth is padding, and the padding is the mean colour.
    assert np.abs(np.median(values)) < 0.02


# Kinds of input


def test_every_way_to_name_a_picture_gives_the_same_pixels(small, reference, tmp_path):
    path = reference / "images" / "photo.jpg"
    data = path.read_bytes()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/photo.jpg"
        expected = pixels(small, Image.open(path))
        array = np.asarray(Image.open(path).convert("RGB"))
        text = base64.b64encode(data).decode()
        for image in (
            str(path), path, url, data, f"data:image/jpeg;base64,{text}", text, array, array.transpose(2, 0, 1),
            torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255.0,
            array.astype(np.float32), array.astype(np.int64), array.astype(np.uint16) * 257,
        ):  # fmt: skip
            assert np.array_equal(pixels(small, image), expected), type(image)
        server.shutdown()


def test_exif_rotation_is_applied_to_files_and_not_to_pil_images(small, tmp_path):
    image = Image.fromarray(noise(20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    upright = pixels(small, image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(small, path), upright)
    assert np.array_equal(pixels(small, path.read_bytes()), upright)
    assert np.array_equal(pixels(small, Image.open(path)), pixels(small, image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "HSV", "YCbCr", "PA"])
def test_every_mode_becomes_rgb_as_pillow_does_it(small, mode):
    image = Image.fromarray(noise(20, 30)).convert("P" if mode == "PA" else mode)
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise(20, 30, 1)[..., 0]))
    assert np.array_equal(pixels(small, image), pixels(small, image.convert("RGB")))


def test_transparency_is_dropped(small):
    colours = Image.fromarray(noise(20, 30))
    clear = colours.copy()
    clear.putalpha(0)
    assert np.array_equal(pixels(small, clear), pixels(small, colours))


def test_deep_greyscale_is_scaled_and_not_clipped(small):
    grey = noise(20, 30)[..., 0]
    expected = pixels(small, Image.fromarray(grey))
    deep = Image.fromarray((grey.astype(np.uint16)) * 257)
    assert deep.mode.startswith("I;16")
    assert np.array_equal(pixels(small, deep), expected)
    assert np.array_equal(pixels(small, as_bytes(deep)), expected)
    assert np.array_equal(pixels(small, Image.fromarray(grey.astype(np.int32) * 257)), expected)
    assert np.array_equal(pixels(small, Image.fromarray(grey.astype(np.int32))), expected)
    assert np.array_equal(pixels(small, Image.fromarray(grey.astype(np.float32))), expected)
    assert np.array_equal(pixels(small, Image.fromarray(grey.astype(np.float32) / 255)), expected)


def test_the_first_frame_of_an_animation_counts(small):
    frames = [Image.fromarray(noise(20, 30, seed)).quantize(16) for seed in (0, 1)]
    data = as_bytes(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(small, data), pixels(small, Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 1, 3), (3, 5, 3), (1, 1, 3), (4, 9, 3), (3, 3, 3)])
def test_arrays_that_look_channel_first_are_not_misread(small, shape):
    array = noise(*shape[:2])
    assert array.shape == shape
    expected = pixels(small, Image.fromarray(array))
    assert np.array_equal(pixels(small, array), expected)
    assert np.array_equal(pixels(small, torch.from_numpy(array).permute(2, 0, 1)), expected)
    assert np.array_equal(pixels(small, array.transpose(2, 0, 1), input_data_format="channels_first"), expected)
    assert np.array_equal(pixels(small, torch.from_numpy(array), input_data_format="channels_last"), expected)


def test_grey_and_alpha_arrays(small):
    grey = noise(20, 30)[..., 0]
    expected = pixels(small, Image.fromarray(grey))
    for array in (grey, grey[..., None], grey[None], np.stack([grey] * 3 + [grey * 0], -1)):
        assert np.array_equal(pixels(small, array), expected)
    assert np.array_equal(pixels(small, grey > 99), pixels(small, Image.fromarray((grey > 99).astype(np.uint8) * 255)))


def test_lists_batches_and_formats(small):
    images = [Image.fromarray(noise(20, 30, seed)) for seed in range(3)]
    expected = np.stack([pixels(small, image) for image in images])
    for given in (images, [images[:1], images[1:]], [[], images], tuple(images)):
        assert np.array_equal(small(given, return_tensors="np")["pixel_values"], expected)
    batch = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(small(batch, return_tensors="np")["pixel_values"], expected)
    tensor = small(images, return_tensors="pt")["pixel_values"]
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 3, 28, 28)
    last = small(images, return_tensors="np", data_format="channels_last")["pixel_values"]
    assert np.array_equal(last.transpose(0, 3, 1, 2), expected)
    assert len(small(images)["pixel_values"]) == 3


# Settings


def test_each_step_can_be_left_out(small):
    image = Image.fromarray(noise(40, 28))
    raw = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
    off = {"do_pad": False, "do_resize": False, "do_center_crop": False}
    assert np.array_equal(pixels(small, image, **off, do_rescale=False, do_normalize=False), raw)
    scaled = pixels(small, image, **off, do_normalize=False)
    np.testing.assert_allclose(scaled, raw / 255, rtol=1e-6)
    cropped = pixels(small, image, do_pad=False, do_resize=False, do_rescale=False, do_normalize=False)
    assert np.array_equal(cropped, raw[:, 6:34])
    padded = pixels(small, image, do_resize=False, do_center_crop=False)
    assert padded.shape == (3, 40, 40)
    wide = pixels(small, image, **off | {"do_center_crop": True}, crop_size=50, do_normalize=False)
    assert wide.shape == (3, 50, 50)
    assert np.array_equal(wide[:, 5:45, 11:39], scaled)
    assert wide[:, :5].max() == 0
    assert pixels(small, image, size={"height": 10, "width": 20}, crop_size=[10, 20]).shape == (3, 10, 20)


def test_misspelt_keywords_are_named(small, caplog):
    with caplog.at_level(logging.WARNING):
        pixels(small, Image.new("RGB", (4, 4)), do_padd=False)
    assert "no keyword `do_padd`, which has no effect; did you mean `do_pad`?" in caplog.text


# Errors


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), r"1, 3 or 4 channels, first or last: got shape \(2, 2, 2\)"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "An array must be one picture"),
        (np.zeros((0, 4, 3), np.uint8), "must have pixels: got an array"),
        (np.full((4, 4, 3), -1.0), "must lie in 0 to 255 .*got -1.0 to -1.0"),
        (np.full((4, 4, 3), 256), "got 256 to 256"),
        (np.full((4, 4, 3), np.nan), "finite numbers: got NaN"),
        (np.zeros((4, 4, 3), complex), "integers or floats: got dtype complex128"),
        (Image.new("RGB", (0, 4)), "must have pixels: got one of 0x4"),
        (b"not a picture", "13 bytes is not a picture that Pillow can read"),
        ("data:image/png;base64,AAAA", "not a picture that Pillow can read"),
        ("http://127.0.0.1:9/none.png", "http://127.0.0.1:9/none.png' cannot be read"),
        (3, "a path, a URL, a data URL or bytes: got int"),
        ([], "at least one picture: got an empty list"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_named(small, image, message):
    with pytest.raises(ValueError, match=message):
        small(image)


def test_broken_and_missing_files_are_named(small, reference, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no picture at '.*none\.png'\. Check the path"):
        small(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="There is no picture at"):
        small(str(tmp_path))
    # Nothing listens there.
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/a\.png' cannot be read .* Check the address"):
        small("http://127.0.0.1:9/a.png")
    data = (reference / "images" / "photo.jpg").read_bytes()
    for cut in (len(data) // 2, 100):
        path = tmp_path / "cut.jpg"
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"cut\.jpg' (cannot be read .* Is it complete|is not a picture)"):
            small(path)
    with pytest.raises(ValueError, match=r"The picture cannot be decoded .* Is the file complete"):
        small(Image.open(io.BytesIO(data[: len(data) // 2])))
    with pytest.raises(ValueError, match=r"^Picture 1 of 2: .*cannot be read"):
        small([data, data[: len(data) // 2]])


def test_decompression_bombs_are_refused(small, monkeypatch):
    data = as_bytes(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large to be safe .* raise `PIL.Image.MAX_IMAGE_PIXELS`"):
        small(data)
    with pytest.raises(ValueError, match="limit of 2000 pixels: got one of 1x100 pixels"):
        small(Image.new("RGB", (1, 100)))
    with pytest.raises(ValueError, match="limit of 2000 pixels: got one of 1x100 pixels"):
        small(Image.new("RGB", (1, 100)), do_resize=False)
    with pytest.raises(ValueError, match="limit of 2000 pixels: got one of 1x100 pixels"):
        small(Image.new("RGB", (1, 100)), do_pad=False)


def test_sizes_that_say_nothing_are_named():
    with pytest.raises(
        ValueError, match=r"`size` must give \['height', 'width'\] or \['shortest_edge'\].*got {'edge': 3}"
    ):
        EmmaImageProcessor(size={"edge": 3})
    with pytest.raises(ValueError, match="each at least 1: got"):
        EmmaImageProcessor(crop_size=0)
    with pytest.raises(ValueError, match="`image_mean` must be three numbers, for red, green and blue: got 0.5"):
        EmmaImageProcessor(image_mean=0.5)
    with pytest.raises(ValueError, match=r"`image_std` must be three numbers, each above 0.*got \[1, 1, 0\]"):
        EmmaImageProcessor()(Image.new("RGB", (2, 2)), image_std=[1, 1, 0])
    off = {"do_pad": False, "do_resize": False, "do_center_crop": False}
    with pytest.raises(ValueError, match="different sizes cannot make one tensor"):
        EmmaImageProcessor(**off)([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))], return_tensors="np")
    with pytest.raises(ValueError, match="'channels_first' or 'channels_last': got 'first'"):
        EmmaImageProcessor()(Image.new("RGB", (2, 2)), data_format="first")


# Saving and loading


def test_it_loads_from_its_folder_alone_and_again_after_a_save(small, reference, tmp_path):
    small.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "image_processing_emma.py").is_file()
    shutil.copy(reference / "images" / "photo.jpg", tmp_path)
    code = """
import sys, numpy as np
# Before Transformers 5.20, `transformers` has a placeholder of that name without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
for source, target in (("first", "second"), ("second", "third")):
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    assert "transformers_modules" in type(processor).__module__, type(processor)
    processor.save_pretrained(target)
np.save("pixels.npy", processor("photo.jpg", return_tensors="np")["pixel_values"][0])
"""
    done = run_python(code, cwd=tmp_path, importable=False, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "pixels.npy"), pixels(small, tmp_path / "photo.jpg"))
    assert (tmp_path / "third" / "preprocessor_config.json").read_text() == (
        tmp_path / "first" / "preprocessor_config.json"
    ).read_text()


@pytest.mark.parametrize("size", [30, 200, 320, 400])
def test_base64_without_a_scheme_is_read_whatever_its_length_and_slashes(size):
    image = Image.new("RGB", (size, size), (16, 0, 0))
    data = io.BytesIO()
    image.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    expected = EmmaImageProcessor(size=28, crop_size=28)(image, return_tensors="pt")["pixel_values"]
    for given in (text, lines):
        assert torch.equal(
            EmmaImageProcessor(size=28, crop_size=28)(given, return_tensors="pt")["pixel_values"], expected
        )


def test_a_name_too_long_is_no_file():
    with pytest.raises(FileNotFoundError, match="There is no picture at"):
        EmmaImageProcessor()("no such file, " * 200)
