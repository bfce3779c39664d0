"""Plain errors of `from_pretrained`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from .errors_emma import EmmaError, MissingPackageError

QUANTIZATION_EXTRA = 'pip install "emma-hf[quantization]"'

UNQUANTIZED_REMEDY = (
    "If the weights are not quantized, remove `quantization_config` from config.json, and pass it to `from_pretrained` "
    "instead."
)

# Type and text of what Transformers and safetensors raise, and the error that is raised in its place. A missing package
# is an ImportError in some places of Transformers and its relative in others.
LOADING_ERRORS: tuple[tuple[type[Exception], str, type[EmmaError], str], ...] = (
    (
        RuntimeError,
        "mismatch",
        EmmaError,
        "The config and the weights must have the same shapes: those of {source} differ ({error}). Restore its config, "
        "or pass `ignore_mismatched_sizes=True` to begin these weights anew.",
    ),
    (
        SafetensorError,
        "",
        EmmaError,
        "The weight files must be whole: {source} has one that is truncated or damaged ({error}). Fetch or save it "
        "again.",
    ),
    (
        ImportError,
        "bitsandbytes",
        MissingPackageError,
        "4-bit and 8-bit weights need the package bitsandbytes, 0.46.1 or newer: {error} Install it with "
        f"`{QUANTIZATION_EXTRA}`.",
    ),
    (
        ImportError,
        "quantiz",
        MissingPackageError,
        "Quantized weights need the package of their method: {source} asks for one that is not installed ({error}).",
    ),
    (
        # 4.57, where a quantized layer finds nothing in the checkpoint.
        NotImplementedError,
        "meta tensor",
        EmmaError,
        "Each weight must be stored in the form that the config says: {source} lacks some in that form ({error}). "
        f"{UNQUANTIZED_REMEDY}",
    ),
    (
        RecursionError,
        "JSON",
        EmmaError,
        "JSON files must not be nested this deeply: {source} has one that is ({error}). Fetch or save it again.",
    ),
    (
        RuntimeError,
        "conversion of the weights",
        EmmaError,
        "A quantization must be one that this device and the installed packages can run: {source} could not be "
        "quantized, for the reason in the report above ({error}). Choose another, or install what it names.",
    ),
)


@contextmanager
def loading_errors(source: object) -> Iterator[None]:
    """Say which rule a checkpoint breaks, and what to do about it; errors that are not in the table pass.

    Args:
        source: name of the checkpoint, for the message.

    Raises:
        EmmaError: a weight file that is truncated or damaged, weights of another shape or form than the config says, or
            a quantization that cannot run here.
        MissingPackageError: a quantization whose package is missing or too old.
    """
    try:
        yield
    except Exception as error:
        for error_type, pattern, raised, message in LOADING_ERRORS:
            if isinstance(error, error_type) and re.search(pattern, str(error)):
                raise raised(message.format(source=source, error=error)) from error
        raise


__all__ = ["UNQUANTIZED_REMEDY", "loading_errors"]
