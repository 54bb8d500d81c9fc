"""SafetensorsWriter against the safetensors library: layout, bytes, hash, size and failures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from collie_core.safetensors_writer import DTYPE_NAMES, SafetensorsWriter


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits of any dtype (0 or 1 for bool)."""
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    """The elements as bytes, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def specs_of(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def write_all(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    writer = SafetensorsWriter(path, specs_of(tensors))
    for name in writer.names:
        writer.write(name, tensors[name])
    return writer.close()


def offsets(path: Path) -> dict[str, list[int]]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_is_read_back_byte_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": random_tensor((3, 5), dtype), "scalar": random_tensor((), dtype)}
    tensors |= {"empty": random_tensor((0, 4), dtype), "b": random_tensor((7,), dtype)}
    path = tmp_path / "x.safetensors"
    sha256, size = write_all(path, tensors)
    assert (sha256, size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape, raw(found)) == (dtype, tensor.shape, raw(tensor)), name


def test_mixed_element_sizes_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "flags": random_tensor((3,), torch.bool),
        "double": random_tensor((2, 2), torch.float64),
        "half": random_tensor((5,), torch.bfloat16),
        "single": random_tensor((3,), torch.float32),
    }
    path = tmp_path / "x.safetensors"
    write_all(path, tensors)
    for name, (start, _) in offsets(path).items():
        assert start % tensors[name].element_size() == 0, name
    assert {name: raw(tensor) for name, tensor in load_file(path).items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }


def test_the_order_of_the_specs_is_kept_where_it_is_aligned(tmp_path: Path) -> None:
    tensors = {
        "z": random_tensor((4,), torch.bfloat16),
        "a": random_tensor((4,), torch.float32),
        "m": random_tensor((4,), torch.bfloat16),
    }
    write_all(tmp_path / "x.safetensors", tensors)
    assert list(offsets(tmp_path / "x.safetensors")) == ["z", "a", "m"]


def test_writing_in_another_order_gives_the_same_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(300, 1000) for name in "abcd"}
    expected = write_all(tmp_path / "x", tensors)
    writer = SafetensorsWriter(tmp_path / "y", specs_of(tensors))
    for name in "bdac":
        writer.write(name, tensors[name])
    assert writer.close() == expected
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_views_write_their_own_elements_only(tmp_path: Path) -> None:
    storage = torch.randn(2000, 1000)
    tensors = {
        "rows": storage[10:200],
        "columns": storage[:, 3:50],
        "transposed": storage[:300].T,
        "strided": storage[::7, ::3],
        "expanded": storage[0, :5].expand(40, 5),
        "wide": storage.view(1_000_000, 2).T,  # a row is larger than a chunk
        "conjugate": torch.randn(30, dtype=torch.complex64).conj(),
    }
    path = tmp_path / "x.safetensors"
    _, size = write_all(path, tensors)
    found = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.resolve_conj()), name
    content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert content < size < content * 1.01


def test_parameters_and_several_chunks(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(1500, 1001))  # 6 MB: two chunks
    sha256, _ = write_all(tmp_path / "x", {"p": parameter})
    assert torch.equal(load_file(tmp_path / "x")["p"], parameter)
    assert sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_a_body_that_raises_leaves_no_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "x", specs_of(tensors)) as writer:
        writer.write("a", tensors["a"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": ((2, 3), torch.float32), "b": ((1,), torch.float32)})
    with pytest.raises(ValueError, match=r"'a' is \(3, 2\) torch.float32, announced as \(2, 3\)"):
        writer.write("a", torch.ones(3, 2))
    with pytest.raises(ValueError, match="torch.float16"):
        writer.write("a", torch.ones(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="'c' is not expected"):
        writer.write("c", torch.ones(1))
    writer.write("a", torch.ones(2, 3))
    with pytest.raises(ValueError, match="'a' is not expected, or was written before"):
        writer.write("a", torch.ones(2, 3))
    with pytest.raises(ValueError, match="never written: b"):
        writer.close()
    writer.abort()
    assert not (tmp_path / "x").exists()


def test_a_dtype_that_the_format_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'z'.*complex128"):
        SafetensorsWriter(tmp_path / "x", {"z": ((1,), torch.complex128)})
    assert not (tmp_path / "x").exists()
