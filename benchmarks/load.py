"""Loading and saving a model: ours beside transformers, seconds and peak memory, each in a fresh process.

    python benchmarks/load.py                # 1 GB in fp32, files in the page cache
    python benchmarks/load.py --gigabytes 4 --dtype bfloat16 --rounds 7
    python benchmarks/load.py --family all   # each in its original layout

transformers reads the same folder where it implements the family, else its relative
(`collie export --as`), and nothing where there is none.  `hf` is GPT-NeoX by collie-hf.
A round runs every measurement once, in turn, so that a busy machine slows all of them; the table shows
medians, and the median over rounds of ours / transformers.  Extra memory is the rise of the process's peak
resident memory (VmHWM) beyond the model's own size; warm-up with a tiny model is not counted.
First use reads every parameter once: transformers, and we, map files whose dtype is the wanted one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
}
_CHATGLM2: dict[str, Any] = {
    "padded_vocab_size": 8000,
    "hidden_size": 2048,
    "ffn_hidden_size": 5504,
    "num_attention_heads": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
}


@dataclass(frozen=True)
class Family:
    """config: all but the number of layers, which is under the key `layers`.  tiny: what a small one changes.
    relative: what transformers can read, a name for `collie export --as`; None: nothing.  native: it reads
    the family itself."""

    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    relative: str | None
    layers: str = "num_hidden_layers"
    native: bool = False


_TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_TINY_GLM = {"hidden_size": 32, "num_attention_heads": 2}


def _grouped(model_type: str, **more: int) -> Family:
    """A family in LLaMA's terms with fewer heads for keys and values."""
    config = {"model_type": model_type, "num_key_value_heads": 4, **_LLAMA, **more}
    return Family(config, _TINY | {"num_key_value_heads": 1}, None, native=True)


FAMILIES = {
    "llama": Family({"model_type": "llama", **_LLAMA}, _TINY, None, native=True),
    "qwen2": _grouped("qwen2"),
    "qwen3": _grouped("qwen3", head_dim=128),
    "mistral": _grouped("mistral"),
    "hf": Family({"model_type": "gpt_neox", **_LLAMA}, _TINY, None, native=True),
    "internlm": Family({"model_type": "internlm", **_LLAMA}, _TINY, "llama"),
    "internlm2": Family(
        {"model_type": "internlm2", "bias": False, "num_key_value_heads": 4, **_LLAMA},
        _TINY | {"num_key_value_heads": 1},
        "llama",
    ),
    "moss": Family(
        {"model_type": "moss", "vocab_size": 8000, "n_embd": 2048, "n_head": 16, "rotary_dim": 64},
        {"n_embd": 32, "n_head": 4, "rotary_dim": 4},
        "codegen",
        "n_layer",
    ),
    "chatglm2": Family(
        {"model_type": "chatglm", "kv_channels": 128, **_CHATGLM2},
        _TINY_GLM | {"ffn_hidden_size": 32, "kv_channels": 16},
        "glm",
        "num_layers",
    ),
    "chatglm": Family(
        {
            "model_type": "chatglm",
            "vocab_size": 8000,
            "hidden_size": 2048,
            "inner_hidden_size": 8192,
            "num_attention_heads": 16,
            "bos_token_id": 7004,
            "eos_token_id": 7005,
            "mask_token_id": 7000,
            "gmask_token_id": 7001,
        },
        _TINY_GLM | {"inner_hidden_size": 32},
        None,
        "num_layers",
    ),
}
CONTESTANTS = ("ours", "transformers")


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure(contestant: str, paths: Sequence[Path], dtype_name: str) -> dict[str, float]:
    """Seconds and extra memory of loading and saving, in this process."""
    import torch

    source, tiny, out = paths
    dtype = getattr(torch, dtype_name)
    if contestant == "ours":
        from collie_core import AutoModelForCausalLM

        def load(folder: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM as StockModel

        def load(folder: Path) -> Any:
            return StockModel.from_pretrained(folder, dtype=dtype)

    load(tiny).save_pretrained(out / "tiny")
    before, start = peak_bytes(), time.perf_counter()
    model = load(source)
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().sum()  # both map files, so that pages are read when they are first used
    used, after_load = time.perf_counter(), peak_bytes()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    begin = time.perf_counter()
    model.save_pretrained(out / "model")
    saved = time.perf_counter()
    return {
        "load_seconds": loaded - start,
        "load_and_first_use_seconds": used - start,
        "load_extra_mb": (after_load - before - size) / 1e6,
        "save_seconds": saved - begin,
        "save_extra_mb": (peak_bytes() - after_load) / 1e6,
    }


def prepare(folder: Path, family: Family, gigabytes: float, dtype_name: str) -> None:
    """A model of about `gigabytes` in fp32 (stored in `dtype`) and a tiny one, and both for transformers:
    `source` and `tiny` in the folders `ours` and `transformers`."""
    import torch

    from collie_core import AutoModelForCausalLM
    from collie_core.cli.main import main as collie

    one, two = (parameters(dict(family.config) | {family.layers: count}) for count in (1, 2))
    layers = max(1, round((gigabytes * 1e9 / 4 - one) / (two - one)) + 1)
    models = {"source": {family.layers: layers}, "tiny": {**family.tiny, family.layers: 1}}
    for name, changes in models.items():
        config = dict(family.config) | changes
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype_name))
        model.save_pretrained(folder / "ours" / name)
        if family.native:
            (folder / "transformers").mkdir(exist_ok=True)
            (folder / "transformers" / name).symlink_to(folder / "ours" / name)
        elif family.relative is not None:
            out = folder / "transformers" / name
            with contextlib.redirect_stdout(sys.stderr):
                collie(["export", str(folder / "ours" / name), str(out), "--as", family.relative])


def parameters(config: dict[str, Any]) -> int:
    """How many a model has."""
    import torch

    from collie_core.models.provider import provider_for
    from collie_core.ops import select_ops

    selected = provider_for(config, None)
    with torch.device("meta"):
        return sum(p.numel() for p in selected.provider.build(selected.config, select_ops()).parameters())


def run_child(contestant: str, source: Path, tiny: Path, out: Path, dtype: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    paths = [str(path) for path in (source, tiny, out)]
    command = [sys.executable, __file__, "--child", contestant, *paths, "--dtype", dtype]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--stored", choices=["float32", "bfloat16", "float16"], help="default: --dtype")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--family", default="llama", choices=[*FAMILIES, "all"])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contestant, *paths = args.child
        print(json.dumps(measure(contestant, [Path(path) for path in paths], args.dtype)))
        return
    for name in FAMILIES if args.family == "all" else [args.family]:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            prepare(Path(folder), FAMILIES[name], args.gigabytes, args.stored or args.dtype)
            report(name, compare(Path(folder), args.rounds, args.dtype))


def compare(folder: Path, rounds: int, dtype: str) -> dict[str, dict[str, list[float]]]:
    """contestant -> figure -> a value a round, of those contestants that have something to read."""
    names = [name for name in CONTESTANTS if (folder / name).is_dir()]
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                source, tiny = folder / name / "source", folder / name / "tiny"
                for figure, value in run_child(name, source, tiny, Path(out), dtype).items():
                    figures[name][figure].append(value)
    return figures


def report(family: str, figures: dict[str, dict[str, list[float]]]) -> None:
    """Print the table of a family."""
    print(
        f"{family:28}" + "".join(f"{name:>14}" for name in figures) + (f"{'ratio':>8}" * (len(figures) > 1))
    )
    for figure, ours in figures["ours"].items():
        line = f"{figure:28}" + "".join(
            f"{statistics.median(found[figure]):14.2f}" for found in figures.values()
        )
        if "seconds" in figure and "transformers" in figures:
            theirs = figures["transformers"][figure]
            line += f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):8.2f}"
        print(line)


if __name__ == "__main__":
    main()
