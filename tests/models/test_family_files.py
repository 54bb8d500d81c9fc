"""Every kind of file that a family's checkpoint may be in, read to the same model and written back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collie_core import AutoModelForCausalLM
from collie_core.models.weight_files import WeightReader

CASES = Path(__file__).parent.parent / "golden" / "cases"
FAMILIES = [path.parent.name for path in sorted(CASES.glob("*/config.json"))]


def write(folder: Path, tensors: dict[str, Tensor], suffix: str, files: int) -> None:
    """The weights in so many files."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    save: Callable[[dict[str, Tensor], Path], None] = torch.save if suffix == "bin" else save_file
    if files == 1:
        return save(tensors, folder / f"{stem}.{suffix}")
    weight_map: dict[str, str] = {}
    for number in range(files):
        part = dict(list(tensors.items())[number::files])
        file = f"{stem}-{number + 1:05}-of-{files:05}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_file_gives_the_same_model_and_is_written_back_to_the_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reader = WeightReader(CASES / family)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name in reader
        for tensor in [reader.get(name).contiguous()]
    }
    first: dict[str, Tensor] = {}
    for suffix, files in (("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)):
        folder = tmp_path / f"{suffix}{files}"
        folder.mkdir()
        shutil.copy(CASES / family / "config.json", folder)
        write(folder, tensors, suffix, files)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        found = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in first)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        model.save_pretrained(folder / "out")
        saved = load_file(folder / "out" / "model.safetensors")
        for name in saved:
            assert torch.equal(saved[name], tensors[name]), name
        assert saved
        missing = tensors.keys() - saved.keys()
        assert all("inv_freq" in name or "causal_mask" in name or "masked_bias" in name for name in missing)
