"""What `from_pretrained` makes plain where loading fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors_emma import EmmaError, MissingPackageError

QUANTIZATION_EXTRA = 'pip install "emma-hf[quantization]"'


@contextmanager
def loading_errors(source: object) -> Iterator[None]:
    """Say which rule a checkpoint breaks, and what to do about it.

    Args:
        source: of the checkpoint, for the message.

    Raises:
        EmmaError: a weight file that is truncated or damaged, weights of another shape than the config says, or a
            quantization that cannot run here.
        MissingPackageError: a quantization whose package is missing or too old.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise EmmaError(
                f"The config and the weights must have the same shapes: those of {source} differ ({error}). "
                "Restore its config, or pass `ignore_mismatched_sizes=True` to begin these weights anew."
            ) from error
        # By its name: safetensors itself is not imported by the files that travel.
        if type(error).__name__ == "SafetensorError":
            raise EmmaError(
                f"The weight files must be whole: {source} has one that is truncated or damaged ({error}). Fetch "
                "or save it again."
            ) from error
        # A missing package is an ImportError in some places of Transformers and its relative in others.
        if isinstance(error, ImportError) and "bitsandbytes" in str(error):
            raise MissingPackageError(
                f"4-bit and 8-bit weights need the package bitsandbytes, 0.46.1 or newer: {error} Install it with "
                f"`{QUANTIZATION_EXTRA}`."
            ) from error
        if isinstance(error, RuntimeError) and "conversion of the weights" in str(error):
            raise EmmaError(
                f"A quantization must be one that this device and the installed packages can run: {source} could not "
                f"be quantized, for the reason in the report above ({error}). Choose another, or install what it names."
            ) from error
        raise


__all__ = ["loading_errors"]
