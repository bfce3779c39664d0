"""How what a processor made of each prompt becomes a batch."""

from typing import Any

from transformers import BatchFeature

from .errors_emma import EmmaError


def as_batch(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    """The inputs of a model as a batch.

    Args:
        data: `input_ids` and what else is one list per prompt; `pixel_values` and `instruction_input_ids`, tensors.
        return_tensors: `pt`, `np`, or None for lists.

    Raises:
        EmmaError: prompts of different lengths where tensors are asked for.
    """
    if return_tensors != "pt":
        for name in {"pixel_values", "instruction_input_ids"} & data.keys():
            data[name] = data[name].numpy() if return_tensors == "np" else data[name].tolist()
    if return_tensors is not None and "input_ids" in data:
        _check_rectangular(data["input_ids"])
    return BatchFeature(data, tensor_type=return_tensors)


def _check_rectangular(rows: list[list[int]]) -> None:
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise EmmaError(
            f"Prompts of different lengths cannot make one tensor: got {lengths} tokens. Pass `padding=True`."
        )


def padded(values: list, length: int, fill: Any, side: str) -> list:
    """`values` filled up to `length` on the `side`, `left` or `right`."""
    padding = [fill] * (length - len(values))
    return padding + values if side == "left" else values + padding


__all__ = ["as_batch", "padded"]
