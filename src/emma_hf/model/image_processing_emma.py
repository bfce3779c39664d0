"""Image processor of EMMA: images of any kind to CLIP's pixels, padded to a square first."""

import base64
import binascii
import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, load_image

from .code_files_emma import AUTO_MAP, copy_code_files
from .compat_emma import push_saved
from .errors_emma import EmmaError

logger = logging.getLogger(__name__)

# Keywords of other image processors that say nothing about the pixels here.
IGNORED_KEYWORDS = {"device", "disable_grouping", "default_to_square", "image_seq_length", "input_data_format"}

# Rows are widened to the square in strips of about this many pixels: a tall image never needs the whole square.
STRIP_PIXELS = 1 << 22


class EmmaImageProcessor(BaseImageProcessor):
    """Pad to a square with the mean color, resize, crop and normalize, as the authors' `process_images` does.

    An image may be a PIL image (taken as it is), a path, a URL, a data URL or bytes (turned upright by their EXIF
    tag, as Transformers' `load_image` does), an array or a tensor.

    - Everything that Pillow opens becomes RGB as `Image.convert("RGB")` does it, so transparency is dropped, and of an
      animation the current frame counts. 16-bit and floating-point grayscale are scaled to 8 bits; the authors' code
      clips them to white. (From a URL they come clipped, by `load_image`.)
    - Arrays are (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels. Where
      both readings fit, a numpy array has its channels last and a tensor first; `input_data_format` decides otherwise.
      Integers are 0 to 255 (`uint16`: 0 to 65535), floats 0 to 1 or 0 to 255.

    Args:
        do_pad: pad to a square around the center before resizing (the released setting).
        do_resize: resize the shorter side to `size`.
        size: `{"shortest_edge": pixels}`, or `{"height": pixels, "width": pixels}`.
        resample: Pillow's filter, 3 for bicubic.
        do_center_crop: crop the center, with black where the image is smaller.
        crop_size: `{"height": pixels, "width": pixels}`.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255.
        do_normalize: subtract `image_mean` and divide by `image_std`, per channel.
        image_mean: also the color of the padding, times 255.
        image_std: see `do_normalize`.
        do_convert_rgb: kept for the common interface; pixels are always RGB.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        do_pad: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_pad = do_pad
        self.do_resize = do_resize
        self.size = _size("size", 336 if size is None else size, "shortest_edge")
        self.resample = int(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _size("crop_size", 336 if crop_size is None else crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = _per_channel("image_std", OPENAI_CLIP_STD if image_std is None else image_std)
        self.do_convert_rgb = do_convert_rgb

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: one image, or a list of them, or a list of such lists; the order is kept.
            return_tensors: `"pt"` or `"np"`; default: a list of arrays.
            data_format: `"channels_first"` or `"channels_last"`, of the result.
            input_data_format: the same, of arrays and tensors given.
            **overrides: any argument of the constructor, for this call.

        Returns:
            `pixel_values`, float32 (images, 3, height, width).

        Raises:
            EmmaError: an image that cannot be read, is truncated, has no pixels or too many, or an array of a wrong
                shape, dtype or range.
            FileNotFoundError: a path that does not exist.
        """
        settings = {**vars(self), **self._known(overrides)}
        flat = _flatten(images)
        if not flat:
            raise EmmaError("`images` must hold at least one picture: got an empty list.")
        pixels = []
        for index, image in enumerate(flat):
            with _image_number_in_errors(index, len(flat)):
                pixels.append(_pixels(_to_rgb(image, input_data_format), settings))
        if _channels_last(data_format):
            pixels = [array.transpose(1, 2, 0) for array in pixels]
        if return_tensors is not None:
            shapes = {array.shape for array in pixels}
            if len(shapes) > 1:
                raise EmmaError(
                    f"Pictures of different sizes cannot make one tensor: got {sorted(shapes)}. Leave `do_resize` and "
                    "`do_center_crop` on."
                )
            stacked = np.stack(pixels)
            pixels = torch.from_numpy(stacked) if str(return_tensors) == "pt" else stacked
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def encode_each(self, images: list[Any], **kwargs: Any) -> torch.Tensor:
        """Prepare a list in which every entry is one image: float32 (images, 3, height, width).

        Raises:
            EmmaError: as [`preprocess`] does, and for an entry that holds no image or several.
        """
        pixel_values = self.preprocess(images, return_tensors="pt", **kwargs)["pixel_values"]
        if len(pixel_values) != len(images):
            raise EmmaError(
                f"Each entry of a list of images must be one image: got {len(images)} entries that hold "
                f"{len(pixel_values)} images. Pass one list of images, or one list per prompt."
            )
        return pixel_values

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read what is named by paths and URLs; images, and the shape of nested lists, stay."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        is_name = isinstance(image_url_or_urls, (str, os.PathLike, bytes))
        return _open(image_url_or_urls) if is_name else image_url_or_urls

    def to_dict(self) -> dict[str, Any]:
        """Like the base class, with the `auto_map` by which `AutoImageProcessor` finds this class."""
        values = {**super().to_dict(), "image_processor_type": type(self).__name__}
        values["auto_map"] = {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Like the base class, with the code files that `trust_remote_code` runs beside it."""
        copy_code_files(save_directory)
        saved = super().save_pretrained(save_directory, **kwargs)
        # The base class pushes what it wrote itself, and thus no code files.
        return push_saved(self, save_directory, kwargs) if push_to_hub else saved

    def _known(self, overrides: dict[str, Any]) -> dict[str, Any]:
        known = {}
        for name, value in overrides.items():
            if name in vars(self):
                if value is not None:
                    known[name] = value
            elif name not in IGNORED_KEYWORDS:
                nearest = difflib.get_close_matches(name, vars(self), n=1)
                hint = f"; did you mean `{nearest[0]}`?" if nearest else "."
                logger.warning("EmmaImageProcessor has no keyword `%s`, which has no effect%s", name, hint)
        if "size" in known:
            known["size"] = _size("size", known["size"], "shortest_edge")
        if "crop_size" in known:
            known["crop_size"] = _size("crop_size", known["crop_size"])
        for name in {"image_mean", "image_std"} & known.keys():
            known[name] = _per_channel(name, known[name])
        return known


def _pixels(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """One RGB image to float32 (3, height, width)."""
    color = tuple(int(value * 255) for value in settings["image_mean"])
    if settings["do_resize"]:
        resample, size = settings["resample"], settings["size"]
        if settings["do_pad"] and image.width != image.height:
            edge = size.get("shortest_edge")
            image = _pad_and_resize(image, (size.get("width", edge), size.get("height", edge)), resample, color)
        else:
            image = image.resize(_resized(image.size, size), resample)
    elif settings["do_pad"]:
        image = _pad(image, color)
    if settings["do_center_crop"]:
        image = _center_crop(image, settings["crop_size"])
    array = np.asarray(image)
    pixels = np.empty((3, *array.shape[:2]), dtype=np.float32)
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    for channel, (mean, std) in enumerate(zip(settings["image_mean"], settings["image_std"])):
        mean, std = (mean, std) if settings["do_normalize"] else (0.0, 1.0)
        np.multiply(array[..., channel], np.float32(factor / std), out=pixels[channel], dtype=np.float32)
        pixels[channel] -= np.float32(mean / std)
    return pixels


def _pad_and_resize(image: Image.Image, size: tuple[int, int], resample: int, color: tuple[int, ...]) -> Image.Image:
    """`image` padded to a square around its center, then resized to `size`, without making the square.

    Pillow resizes rows first and columns second, with 8 bits in between. Doing the two steps apart gives the same
    pixels, and the rows that are only padding need no resizing.
    """
    side, (width, height) = max(image.size), size
    if image.width < image.height and side * side <= STRIP_PIXELS:
        return _pad(image, color).resize(size, resample)
    _check_pixels(width * side, image.size)
    narrow = Image.new("RGB", (width, side), color)
    if image.width > image.height:
        top = (side - image.height) // 2
        narrow.paste(image.resize((width, image.height), resample), (0, top))
    else:
        left = (side - image.width) // 2
        rows = max(STRIP_PIXELS // side, 1)
        for top in range(0, side, rows):
            bottom = min(top + rows, side)
            strip = Image.new("RGB", (side, bottom - top), color)
            strip.paste(image.crop((0, top, image.width, bottom)), (left, 0))
            narrow.paste(strip.resize((width, bottom - top), resample), (0, top))
    return narrow.resize((width, height), resample)


def _pad(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    _check_pixels(side * side, image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _check_pixels(pixels: int, size: tuple[int, int]) -> None:
    # The bound at which Pillow itself refuses a file as a decompression bomb.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > 2 * limit:
        raise EmmaError(
            f"A picture padded to a square must stay under Pillow's limit of {2 * limit} pixels: got one of "
            f"{size[0]}x{size[1]} pixels. Crop it, or make it smaller first."
        )


def _resized(size: tuple[int, int], target: dict[str, int]) -> tuple[int, int]:
    if "shortest_edge" not in target:
        return target["width"], target["height"]
    width, height = size
    edge = target["shortest_edge"]
    long = int(edge * max(size) / min(size))
    result = (edge, long) if width <= height else (long, edge)
    _check_pixels(result[0] * result[1], size)
    return result


def _center_crop(image: Image.Image, size: dict[str, int]) -> Image.Image:
    left, top = (image.width - size["width"]) // 2, (image.height - size["height"]) // 2
    if (left, top) == (0, 0) and image.size == (size["width"], size["height"]):
        return image
    return image.crop((left, top, left + size["width"], top + size["height"]))


def _to_rgb(image: Any, input_data_format: str | None) -> Image.Image:
    if isinstance(image, (str, os.PathLike, bytes)):
        image = _open(image)
    elif isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        image = _from_array(array, input_data_format, prefer_last=False)
    elif isinstance(image, np.ndarray):
        image = _from_array(image, input_data_format, prefer_last=True)
    elif not isinstance(image, Image.Image):
        raise EmmaError(
            "A picture must be a PIL image, an array, a tensor, a path, a URL, a data URL or bytes: got "
            f"{type(image).__name__}."
        )
    if 0 in image.size:
        raise EmmaError(f"A picture must have pixels: got one of {image.width}x{image.height}.")
    try:
        if image.mode.startswith("I") or image.mode == "F":
            return _deep_to_rgb(image)
        # Decoding is what can fail, and it happens in place; an RGB image needs no copy.
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except OSError as error:
        raise EmmaError(f"The picture cannot be decoded ({error}). Is the file complete?") from error


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grayscale, scaled to 8 bits."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255):
        values = values.astype(np.int64)
        _check_range(values, 65535)
        values = np.round(values / 257)
    return _from_array(values.astype(np.float64) if image.mode == "F" else values.astype(np.int64), None, True)


def _from_array(array: np.ndarray, input_data_format: str | None, prefer_last: bool) -> Image.Image:
    if array.ndim == 3:
        array = _to_channels_last(array, input_data_format, prefer_last)
    elif array.ndim != 2:
        raise EmmaError(
            "An array must be one picture, (height, width), (height, width, channels) or (channels, height, width): "
            f"got shape {array.shape}. Pass several pictures as a list."
        )
    if array.size == 0:
        raise EmmaError(f"A picture must have pixels: got an array of shape {array.shape}.")
    array = _to_bytes(array)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array[..., :3] if array.ndim == 3 else array)).convert("RGB")


def _to_channels_last(array: np.ndarray, input_data_format: str | None, prefer_last: bool) -> np.ndarray:
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if input_data_format is not None:
        prefer_last = _channels_last(input_data_format)
        first, last = first and not prefer_last, last and prefer_last
    if not (first or last):
        raise EmmaError(
            f"An array must have 1, 3 or 4 channels, first or last: got shape {array.shape}"
            + (f" with input_data_format={str(input_data_format)!r}." if input_data_format is not None else ".")
        )
    return array if last and (prefer_last or not first) else array.transpose(1, 2, 0)


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257).astype(np.uint8)
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise EmmaError(f"An array must hold integers or floats: got dtype {array.dtype}.")
    if not np.isfinite(array).all():
        raise EmmaError("An array must hold finite numbers: got NaN or infinity.")
    _check_range(array, 255)
    if np.issubdtype(array.dtype, np.floating):
        array = np.round(array * 255 if array.max() <= 1 else array)
    return array.astype(np.uint8)


def _check_range(array: np.ndarray, largest: int) -> None:
    low, high = array.min(), array.max()
    if low < 0 or high > largest:
        raise EmmaError(
            f"Pixel values must lie in 0 to {largest} (floats also in 0 to 1): got {low} to {high}. Pass pictures that "
            "are not normalised yet."
        )


def _open(image: str | os.PathLike | bytes) -> Image.Image:
    """Read an image from where it is, upright."""
    shown = f"{len(image)} bytes" if isinstance(image, bytes) else repr(str(image)[:200])
    try:
        if isinstance(image, bytes):
            opened = Image.open(BytesIO(image))
        elif str(image).startswith(("http://", "https://")):
            return load_image(str(image))
        else:
            opened = Image.open(_path_or_buffer(image))
        opened.load()
        return ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise EmmaError(
            f"The picture {shown} is too large to be safe ({error}). Make it smaller, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
        ) from error
    except UnidentifiedImageError as error:
        raise EmmaError(f"{shown} is not a picture that Pillow can read. Give a PNG, JPEG or similar.") from error
    except Exception as error:
        # Broken files make decoders and network libraries fail in many ways; all of them mean the same here.
        remedy = "Check the address, and that a picture is there." if "://" in shown else "Is it complete?"
        raise EmmaError(f"The picture {shown} cannot be read ({error}). {remedy}") from error


def _path_or_buffer(image: str | os.PathLike) -> Path | BytesIO:
    text = str(image)
    if text.startswith("data:"):
        return BytesIO(base64.b64decode(text.partition(",")[2]))
    # Base64 with a late "/" is a name too long.
    with suppress(OSError):
        if Path(text).is_file():
            return Path(text)
    if isinstance(image, str) and len(text) > 64:
        try:
            return BytesIO(base64.b64decode("".join(text.split()), validate=True))
        except binascii.Error:
            pass
    raise FileNotFoundError(f"There is no picture at {text[:200]!r}. Check the path, or give a URL or a data URL.")


@contextmanager
def _image_number_in_errors(index: int, count: int) -> Iterator[None]:
    """Add to an error which of several images it is about."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if count == 1:
            raise
        raise type(error)(f"Picture {index} of {count}: {error}") from error


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in _flatten(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _channels_last(data_format: Any) -> bool:
    name = data_format.value if isinstance(data_format, ChannelDimension) else data_format
    if name not in ("channels_first", "channels_last"):
        raise EmmaError(f"A data format must be 'channels_first' or 'channels_last': got {data_format!r}.")
    return name == "channels_last"


def _size(name: str, value: Any, single: str | None = None) -> dict[str, int]:
    if isinstance(value, int):
        value = {single: value} if single else {"height": value, "width": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    allowed = [{"height", "width"}] + ([{single}] if single else [])
    value = {key: item for key, item in dict(value).items() if item is not None}
    if set(value) not in allowed or any(item < 1 for item in value.values()):
        keys = " or ".join(str(sorted(keys)) for keys in allowed)
        raise EmmaError(f"`{name}` must give {keys} in pixels, each at least 1: got {value}.")
    return value


def _per_channel(name: str, values: Any) -> list[float]:
    numbers = [float(value) for value in values] if np.ndim(values) == 1 else []
    if len(numbers) != 3 or not np.isfinite(numbers).all() or (name == "image_std" and min(numbers) <= 0):
        bound = ", each above 0" if name == "image_std" else ""
        raise EmmaError(f"`{name}` must be three numbers{bound}, for red, green and blue: got {values!r}.")
    return numbers


def is_nested(images: Any) -> bool:
    return isinstance(images, (list, tuple)) and any(isinstance(image, (list, tuple)) for image in images)


def rows_of_images(images: Any) -> list[list[Any]]:
    """Images as one list per prompt, or as a single list where they are not grouped.

    Among lists, None stands for a prompt without images, as TRL writes it.
    """
    if is_nested(images):
        return [[] if row is None else list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    return [list(images) if isinstance(images, (list, tuple)) or is_batch else [images]]


__all__ = ["EmmaImageProcessor"]
