"""Read and write checkpoint files tensor by tensor, so that memory does not grow with the model."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..model.errors_emma import EmmaError

# Bytes copied at a time.
BLOCK = 16 << 20

INDEX_NAME = "model.safetensors.index.json"

# The safetensors names of dtypes (safetensors file format).
DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or one in memory, whose bytes are read only when they are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0
    tensor: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def blocks(self) -> Iterator[bytes]:
        """The tensor's bytes, row by row, at most a block at a time."""
        if self.tensor is not None:
            yield _bytes_of(self.tensor)
            return
        assert self.path is not None
        # Plain reads: the pages of a memory map would count as this process's memory.
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                block = file.read(min(BLOCK, left))
                if not block:
                    raise EmmaError(f"{self.path} ends inside a tensor: the file is truncated. Fetch it again.")
                left -= len(block)
                yield block

    def load(self) -> torch.Tensor:
        """The whole tensor."""
        if self.tensor is not None:
            return self.tensor
        data = bytearray(b"".join(self.blocks()))
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's `model.safetensors`, of its shards, or of its `pytorch_model.bin`.

    Raises:
        FileNotFoundError: there is none, or the index names a file that is not there.
        EmmaError: a file that is truncated or not what its name says.
    """
    for index_name, read in ((INDEX_NAME, read_safetensors), ("pytorch_model.bin.index.json", read_pickle)):
        if (folder / index_name).is_file():
            return _read_shards(folder, index_name, read)
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        return read_pickle(folder / "pytorch_model.bin")
    raise FileNotFoundError(
        f"{folder} holds no weights: expected model.safetensors, {INDEX_NAME} or pytorch_model.bin. Check the folder."
    )


def _read_shards(folder: Path, index_name: str, read) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((folder / index_name).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise EmmaError(f"{folder / index_name} is not an index of weights ({error}). Fetch it again.") from error
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{index_name} names the shard {name!r}, which {folder} lacks. Fetch it too.")
        tensors.update(read(folder / name))
    lacking = sorted(set(weight_map) - set(tensors))
    if lacking:
        raise EmmaError(
            f"{index_name} names {len(lacking)} tensors that its shards lack, first {lacking[0]!r}. Fetch them again."
        )
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by its header; see [`read_checkpoint`] for the errors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise EmmaError(f"{path} is truncated: {size} bytes do not hold its header. Fetch it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise EmmaError(f"{path} is not a safetensors file ({error}). Fetch it again.") from error
    header.pop("__metadata__", None)
    tensors, end = {}, 8 + length
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise EmmaError(f"{path}: the tensor {name!r} has dtype {entry['dtype']}, which is not supported.")
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), path, start)
        if tensors[name].nbytes != stop - start:
            raise EmmaError(f"{path}: the tensor {name!r} has another size than its shape says. Fetch it again.")
        end = max(end, stop)
    if end != size:
        raise EmmaError(f"{path} is truncated: its header speaks of {end} bytes, it has {size}. Fetch it again.")
    return tensors


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
    return {name: in_memory(tensor) for name, tensor in state_dict.items()}


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(tensor.dtype, tuple(tensor.shape), tensor=tensor)


def write_shards(folder: Path, tensors: dict[str, StoredTensor], max_shard_size: int, progress: bool = True) -> None:
    """Write `tensors` in their order as `model.safetensors`, or as shards of at most `max_shard_size` bytes each and
    an index. A tensor larger than that has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            many = len(shards) > 1
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            write_safetensors(folder / file_name, {name: tensors[name] for name in names}, bar)
            weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, StoredTensor], bar: tqdm | None = None) -> None:
    """Write one safetensors file (its format: length of the header, header, bytes)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
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


@dataclass(frozen=True)
class Cast(StoredTensor):
    """Another tensor, in this one's dtype."""

    source: StoredTensor | None = None

    def blocks(self) -> Iterator[bytes]:
        yield _bytes_of(self.load())

    def load(self) -> torch.Tensor:
        assert self.source is not None
        return self.source.load().to(self.dtype)


@dataclass(frozen=True)
class Rows(StoredTensor):
    """The first rows of another tensor, and then those of a tensor in memory."""

    source: StoredTensor | None = None
    appended: torch.Tensor | None = None

    def blocks(self) -> Iterator[bytes]:
        assert self.source is not None
        tail = b"" if self.appended is None else _bytes_of(self.appended)
        left = self.nbytes - len(tail)
        for block in self.source.blocks():
            yield block[:left]
            left -= len(block[:left])
            if not left:
                break
        if tail:
            yield tail

    def load(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"".join(self.blocks())), dtype=self.dtype).reshape(self.shape)


def cast(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    """`tensor` in `dtype`; integers, and everything where `dtype` is None, stay as they are."""
    if dtype is None or tensor.dtype == dtype or not tensor.dtype.is_floating_point:
        return tensor
    return Cast(dtype, tensor.shape, source=tensor)


def with_row(tensor: StoredTensor, row: torch.Tensor) -> StoredTensor:
    """`tensor` (rows, width) with one more row (width)."""
    shape = (tensor.shape[0] + 1, *tensor.shape[1:])
    return Rows(tensor.dtype, shape, source=tensor, appended=row.to(tensor.dtype))


def without_last_row(tensor: StoredTensor) -> StoredTensor:
    """`tensor` (rows, width) without its last row."""
    return Rows(tensor.dtype, (tensor.shape[0] - 1, *tensor.shape[1:]), source=tensor)


def mean_row(tensor: StoredTensor) -> torch.Tensor:
    """Mean of the rows of `tensor` (rows, width), summed in float64, read a block at a time."""
    width = tensor.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    rest = b""
    for block in tensor.blocks():
        block = rest + block
        whole = len(block) - len(block) % (width * tensor.dtype.itemsize)
        block, rest = block[:whole], block[whole:]
        if block:
            total += torch.frombuffer(bytearray(block), dtype=tensor.dtype).reshape(-1, width).double().sum(0)
    return total / tensor.shape[0]


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `256MB` and the like, by thousands as in Transformers.

    Raises:
        EmmaError: not such a size, or not positive.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            number, factor = text[: -len(unit)], units[unit]
            break
    else:
        number, factor = text, 1
    try:
        value = int(float(number) * factor)
    except ValueError:
        value = 0
    if value < 1:
        raise EmmaError(f"A shard size must be positive, such as 5GB or 256MB: got {size!r}.")
    return value


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _is_zip(path: Path) -> bool:
    # Only files in PyTorch's zip layout can be memory-mapped.
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def most_common_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds the most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
