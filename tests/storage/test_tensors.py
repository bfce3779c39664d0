"""Checkpoint files read and written tensor by tensor: equal to what safetensors and PyTorch read and write."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from emma_hf import EmmaError
from emma_hf.storage import tensors as storage
from emma_hf.storage.tensors import (
    SAFETENSORS_DTYPES,
    AppendedTensor,
    FileTensor,
    MemoryTensor,
    MergedTensor,
    ShortenedTensor,
    StoredTensor,
    cast,
    mean_row,
    most_common_dtype,
    parse_size,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
    write_shards,
)


def random_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, and shapes without a row or a dimension."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(5, 3, generator=generator) * 4).to(dtype) for name, dtype in SAFETENSORS_DTYPES.items()
    }
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}


def loaded(tensors: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in tensors.items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def in_file(tensor: torch.Tensor, folder) -> StoredTensor:
    save_file({"tensor": tensor}, folder / "file.safetensors")
    return read_safetensors(folder / "file.safetensors")["tensor"]


def test_what_safetensors_wrote_is_read(tmp_path):
    save_file(random_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = read_checkpoint(tmp_path)
    assert all(isinstance(tensor, FileTensor) for tensor in tensors.values())
    assert_equal(loaded(tensors), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("block", [7, 16 << 20])
def test_safetensors_reads_what_is_written(tmp_path, monkeypatch, block):
    monkeypatch.setattr(storage, "BLOCK_SIZE", block)
    originals = random_tensors()
    write_safetensors(tmp_path / "first", {name: MemoryTensor(tensor) for name, tensor in originals.items()})
    assert_equal(load_file(tmp_path / "first"), originals)
    write_safetensors(tmp_path / "second", read_safetensors(tmp_path / "first"))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_shards_are_divided_as_huggingface_hub_does(tmp_path):
    from huggingface_hub import save_torch_state_dict

    sizes = {"b": 6, "large": 40, "a": 6, "d": 6, "c": 2}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    write_shards(tmp_path / "ours", {n: MemoryTensor(t) for n, t in tensors.items()}, 50, progress=False)
    save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size=50)
    index, expected = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text()) for folder in ("ours", "theirs")
    )
    assert index["weight_map"] == expected["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    assert list(index["weight_map"]) == sorted(sizes)
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        assert_equal(load_file(tmp_path / "ours" / path.name), load_file(path))
    assert_equal(loaded(read_checkpoint(tmp_path / "ours")), tensors)


def test_one_file_has_no_index(tmp_path):
    write_shards(tmp_path, {"a": MemoryTensor(torch.ones(2))}, 8, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_pickled_weights_and_their_shards(tmp_path):
    tensors = random_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_equal(loaded(read_checkpoint(tmp_path)), tensors)
    (tmp_path / "pytorch_model.bin").unlink()
    torch.save({"a": tensors["F16"]}, tmp_path / "first.bin")
    # The layout before PyTorch 1.6, which cannot be memory-mapped.
    torch.save({"b": tensors["I8"]}, tmp_path / "second.bin", _use_new_zipfile_serialization=False)
    index = {"weight_map": {"a": "first.bin", "b": "second.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(loaded(read_checkpoint(tmp_path)), {"a": tensors["F16"], "b": tensors["I8"]})


@pytest.mark.parametrize("block", [5, 16 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(tmp_path, monkeypatch, block, dtype):
    monkeypatch.setattr(storage, "BLOCK_SIZE", block)
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    row = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for source in (in_file(table, tmp_path), MemoryTensor(table)):
        longer = AppendedTensor(source, row)
        assert (longer.shape, longer.nbytes) == ((7, 3), 21 * dtype.itemsize)
        assert torch.equal(longer.load(), torch.cat([table, row.to(dtype)[None]]))
        shorter = ShortenedTensor(source)
        assert (shorter.shape, shorter.nbytes) == ((5, 3), 15 * dtype.itemsize)
        assert torch.equal(shorter.load(), table[:-1])
        assert torch.equal(ShortenedTensor(longer).load(), table)
        assert torch.equal(ShortenedTensor(cast(source, torch.float16)).load(), table[:-1].half())
        assert torch.equal(mean_row(source), table.double().mean(0))
    assert ShortenedTensor(MemoryTensor(table[:1])).load().shape == (0, 3)


@pytest.mark.parametrize("block", [1, 200, 1 << 24])
@pytest.mark.parametrize(("stored", "dtype"), [("float16", "float16"), ("float32", "float32"), ("float16", "bfloat16")])
def test_a_low_rank_update_is_added_in_float32_and_rounded_once(monkeypatch, block, stored, dtype):
    monkeypatch.setattr(storage, "BLOCK_SIZE", block)
    # Fractions that float32 holds exactly and the shorter types round.
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randint(-500, 500, (7, 5), generator=generator) / 4096).to(getattr(torch, stored))
    down, up = (torch.randint(-9, 9, shape, generator=generator) / 8 for shape in ((3, 5), (7, 3)))
    merged = MergedTensor(*map(MemoryTensor, (weight, down.half(), up)), 1.5, getattr(torch, dtype))
    exact = weight.double() + 1.5 * (up.double() @ down.double())
    assert (dtype == "float32") == torch.equal(exact, exact.to(getattr(torch, dtype)).double())
    assert torch.equal(merged.load(), exact.to(getattr(torch, dtype)))
    assert torch.equal(cast(merged, torch.float64).load(), merged.load().double())


def test_cast_leaves_integers():
    assert torch.equal(cast(MemoryTensor(torch.ones(2)), torch.float16).load(), torch.ones(2, dtype=torch.float16))
    for tensor, dtype in ((torch.ones(2, dtype=torch.int8), torch.float16), (torch.ones(2), None)):
        stored = MemoryTensor(tensor)
        assert cast(stored, dtype) is stored


def test_the_most_common_dtype_is_that_of_most_bytes():
    tensors = [torch.ones(3), torch.ones(7, dtype=torch.float16), torch.ones(2, dtype=torch.float64)]
    assert most_common_dtype(map(MemoryTensor, tensors)) == torch.float64
    assert most_common_dtype(map(MemoryTensor, tensors[:2])) == torch.float16


def write_header(path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": ENTRY}, b"123", "is truncated: its header speaks of"),
        ({"a": {**ENTRY, "shape": [2]}}, b"1234", "the tensor 'a' has another size than its shape says"),
        ({"a": {**ENTRY, "dtype": "F4"}}, b"1234", "the tensor 'a' has dtype F4, which is not supported"),
        ({"a": {"dtype": "F32"}}, b"", "is not a safetensors file"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"1234", "is not a safetensors file"),
        (
            {"a": {**ENTRY, "shape": [-1], "data_offsets": [4, 0]}},
            b"1234",
            r"is not a safetensors file \(shape \(-1,\) at 4 to 0",
        ),
        ({"a": {**ENTRY, "shape": [float("inf")]}}, b"1234", "is not a safetensors file .*infinity"),
        ({"a": {**ENTRY, "shape": [2**70]}}, b"1234", "the tensor 'a' has another size than its shape says"),
        ([], b"", "is not a safetensors file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, header, data, message):
    write_header(tmp_path / "model.safetensors", header, data)
    with pytest.raises(EmmaError, match=rf"model\.safetensors.* {message}|model\.safetensors: {message}"):
        read_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    tensor = in_file(torch.ones(9), tmp_path)
    path = tmp_path / "file.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EmmaError, match=r"file\.safetensors ends inside a tensor: the file is truncated"):
        tensor.load()


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ("{", EmmaError, "is not JSON"),
        ("{}", EmmaError, "must map the names of weights to files, in `weight_map`: got None"),
        ('{"weight_map": {"a": 1}}', EmmaError, "must map the names of weights to files"),
        ('{"weight_map": {"a": "../a.safetensors"}}', FileNotFoundError, r"names the shard '\.\./a\.safetensors'"),
        ('{"weight_map": {"a": "none.safetensors"}}', FileNotFoundError, "which .* lacks. Fetch it too"),
        ('{"weight_map": {"b": "one.safetensors"}}', EmmaError, "names 1 tensors that its shards lack, first 'b'"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, index, kind, message):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(kind, match=message):
        read_checkpoint(tmp_path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no weights: expected model\.safetensors, model\.safetensors\.in"
    ):
        read_checkpoint(tmp_path)
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EmmaError, match="must hold a dictionary of tensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(EmmaError, match="cannot be read as tensors alone, and nothing else in it is run"):
        read_checkpoint(tmp_path)


def test_sizes():
    sizes = {
        "5GB": 5 * 10**9, "256mb": 256 * 10**6, "1.5 GiB": 3 * 2**29, 7: 7, "8KB": 8000, "2TB": 2 * 10**12,
        "300": 300, " 1KiB ": 1024,
    }  # fmt: skip
    assert {size: parse_size(size) for size in sizes} == sizes


@pytest.mark.parametrize("size", ["much", "5XB", "GB", "-5GB", "0", 0, "0.5", "inf", "1.2.3GB", ""])
def test_a_wrong_size_is_named(size):
    with pytest.raises(EmmaError, match=f"A shard size must be positive, such as 5GB or 256MB: got {size!r}"):
        parse_size(size)
