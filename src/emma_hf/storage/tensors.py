"""Read and write checkpoint files tensor by tensor, so that memory does not grow with the model."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..model.errors_emma import EmmaError
from .folders import read_json, write_json

# Bytes read at a time.
BLOCK_SIZE = 16 << 20

# The names of dtypes in the safetensors format.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class StoredTensor(ABC):
    """A tensor whose dtype and shape are known, and whose bytes are read only when they are written."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def blocks(self) -> Iterator[bytes]:
        """The tensor's bytes in row-major order, a block at a time."""

    def load(self) -> torch.Tensor:
        """The complete tensor."""
        data = bytearray(b"".join(self.blocks()))
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


class FileTensor(StoredTensor):
    """A tensor in a file, at an offset in bytes."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], path: Path, offset: int):
        super().__init__(dtype, shape)
        self.path = path
        self.offset = offset

    def blocks(self) -> Iterator[bytes]:
        # Plain reads: the pages of a memory map would count as this process's memory.
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            remaining = self.nbytes
            while remaining:
                block = file.read(min(BLOCK_SIZE, remaining))
                if not block:
                    raise EmmaError(f"{self.path} ends inside a tensor: the file is truncated. Fetch it again.")
                remaining -= len(block)
                yield block


class MemoryTensor(StoredTensor):
    """A tensor in memory."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor.dtype, tuple(tensor.shape))
        self.tensor = tensor

    def blocks(self) -> Iterator[bytes]:
        yield _bytes_of(self.tensor)

    def load(self) -> torch.Tensor:
        return self.tensor


class CastTensor(StoredTensor):
    """Another tensor, converted to `dtype` as a whole."""

    def __init__(self, source: StoredTensor, dtype: torch.dtype):
        super().__init__(dtype, source.shape)
        self.source = source

    def blocks(self) -> Iterator[bytes]:
        yield _bytes_of(self.load())

    def load(self) -> torch.Tensor:
        return self.source.load().to(self.dtype)


class AppendedTensor(StoredTensor):
    """Another tensor (rows, width) and one more row (width)."""

    def __init__(self, source: StoredTensor, row: torch.Tensor):
        super().__init__(source.dtype, (source.shape[0] + 1, *source.shape[1:]))
        self.source = source
        self.row = row.to(source.dtype)

    def blocks(self) -> Iterator[bytes]:
        yield from self.source.blocks()
        yield _bytes_of(self.row)


class ShortenedTensor(StoredTensor):
    """Another tensor (rows, width) without its last row."""

    def __init__(self, source: StoredTensor):
        super().__init__(source.dtype, (source.shape[0] - 1, *source.shape[1:]))
        self.source = source

    def blocks(self) -> Iterator[bytes]:
        remaining = self.nbytes
        for block in self.source.blocks():
            yield block[:remaining]
            remaining -= len(block)
            if remaining <= 0:
                break


class MergedTensor(StoredTensor):
    """The weight of a linear layer with a low-rank update: `source` + `scale` * (`up` @ `down`).

    Computed in float32 and rounded once, a number of rows at a time.

    Args:
        source: the weight (out, in).
        down: LoRA's A (rank, in).
        up: LoRA's B (out, rank).
        scale: factor of the update.
        dtype: dtype of the result.
    """

    def __init__(self, source: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float, dtype: torch.dtype):
        super().__init__(dtype, source.shape)
        self.source = source
        self.down = down
        self.up = up
        self.scale = scale

    def blocks(self) -> Iterator[bytes]:
        weight, down, up = self.source.load(), self.down.load().float(), self.up.load().float()
        rows = max(1, BLOCK_SIZE // (4 * self.shape[1]))
        for start in range(0, self.shape[0], rows):
            part = slice(start, start + rows)
            yield _bytes_of((weight[part].float() + (up[part] @ down) * self.scale).to(self.dtype))


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder has one of the files that [`read_checkpoint`] reads."""
    names = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
    return any((folder / name).is_file() for name in names)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's `model.safetensors`, of its shards, or of its `pytorch_model.bin`.

    Raises:
        FileNotFoundError: the folder holds no weights, or not a file that its index names.
        EmmaError: a file that is truncated or not what its name says.
    """
    for index_name, read in ((SAFE_WEIGHTS_INDEX_NAME, read_safetensors), (WEIGHTS_INDEX_NAME, read_pickle)):
        if (folder / index_name).is_file():
            return _read_shards(folder, index_name, read)
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return read_safetensors(folder / SAFE_WEIGHTS_NAME)
    if (folder / WEIGHTS_NAME).is_file():
        return read_pickle(folder / WEIGHTS_NAME)
    raise FileNotFoundError(
        f"{folder} holds no weights: expected {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME} or {WEIGHTS_NAME}. Check "
        "the folder."
    )


def read_weight_map(path: Path) -> dict[str, str]:
    """The file of each weight, from the index of a checkpoint's shards.

    Raises:
        FileNotFoundError: there is no such index.
        EmmaError: a file that is no index.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise EmmaError(
            f"{path} must map the names of weights to files, in `weight_map`: got {weight_map!r:.80}. Fetch it again."
        )
    return weight_map


def _read_shards(
    folder: Path, index_name: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    weight_map = read_weight_map(folder / index_name)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{index_name} names the shard {name!r}, which {folder} lacks. Fetch it too.")
        tensors.update(read(folder / name))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise EmmaError(
            f"{index_name} names {len(missing)} tensors that its shards lack, first {missing[0]!r}. Fetch them again."
        )
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by its header; see [`read_checkpoint`] for the errors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise EmmaError(f"{path} is truncated: {size} bytes do not hold its header. Fetch it again.")
        header = file.read(length)
    try:
        entries = {name: _parse_entry(entry) for name, entry in json.loads(header).items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EmmaError(f"{path} is not a safetensors file ({error}). Fetch it again.") from error
    tensors: dict[str, StoredTensor] = {}
    end = 8 + length
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise EmmaError(f"{path}: the tensor {name!r} has dtype {dtype}, which is not supported.")
        tensors[name] = FileTensor(SAFETENSORS_DTYPES[dtype], shape, path, 8 + length + start)
        if tensors[name].nbytes != stop - start:
            raise EmmaError(f"{path}: the tensor {name!r} has another size than its shape says. Fetch it again.")
        end = max(end, 8 + length + stop)
    if end != size:
        raise EmmaError(f"{path} is truncated: its header speaks of {end} bytes, it has {size}. Fetch it again.")
    return tensors


def _parse_entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Name of the dtype, shape, and begin and end of the bytes."""
    start, stop = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    if min(start, stop, *shape) < 0:
        raise ValueError(f"shape {shape} at {start} to {stop}")
    return str(entry["dtype"]), shape, start, stop


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one of the authors' own `.bin` files. Nothing but tensors is unpickled.

    Raises:
        EmmaError: a file that holds anything else, code for instance, or is damaged.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise EmmaError(
            f"{path} cannot be read as tensors alone, and nothing else in it is run ({reason}). Fetch it again from "
            "where you trust."
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise EmmaError(f"{path} must hold a dictionary of tensors: got something else. Fetch it again.")
    return {name: MemoryTensor(tensor) for name, tensor in state_dict.items()}


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_shard_size: int, progress: bool = True) -> None:
    """Write `tensors` as `model.safetensors`, or as shards of at most `max_shard_size` bytes each and an index, divided
    as Transformers does. A tensor larger than that has a shard of its own.
    """
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total_size = plan.metadata["total_size"]
    with tqdm(total=total_size, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for file_name, names in plan.filename_to_tensors.items():
            write_safetensors(folder / file_name, {name: tensors[name] for name in names}, bar)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": plan.metadata, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: dict[str, StoredTensor], bar: tqdm | None = None) -> None:
    """Write one safetensors file (its format: length of the header, header, bytes)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(block)
                if bar is not None:
                    bar.update(len(block))


def cast(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    """`tensor` in `dtype`; integers, and everything where `dtype` is None, stay as they are."""
    if dtype is None or tensor.dtype == dtype or not tensor.dtype.is_floating_point:
        return tensor
    return CastTensor(tensor, dtype)


def mean_row(tensor: StoredTensor) -> torch.Tensor:
    """Mean of the rows of `tensor` (rows, width): float64 (width), read a block at a time."""
    width = tensor.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    remainder = b""
    for block in tensor.blocks():
        block = remainder + block
        end = len(block) - len(block) % (width * tensor.dtype.itemsize)
        block, remainder = block[:end], block[end:]
        if block:
            total += torch.frombuffer(bytearray(block), dtype=tensor.dtype).reshape(-1, width).double().sum(0)
    return total / tensor.shape[0]


def most_common_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds the most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `256MB` (powers of 1000, as in Transformers), `1GiB` (powers of 1024) or a number.

    Raises:
        EmmaError: not such a size, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:([KMGT])(I?)B)?", str(size).strip().upper())
    number, unit, binary = match.groups() if match else ("0", None, None)
    value = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
    if value < 1:
        raise EmmaError(f"A shard size must be positive, such as 5GB or 256MB: got {size!r}.")
    return value


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _is_zip(path: Path) -> bool:
    # Only files in PyTorch's zip layout can be memory-mapped.
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
