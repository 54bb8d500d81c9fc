"""What a run writes beside its checkpoints: config.yaml, run.json, model files, the final export."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.files import write_json_atomic, write_text_atomic
from collie_core.versions import versions

if TYPE_CHECKING:
    from collie_core.hookspecs import Layout, ModelProvider
    from collie_core.registry import RunPlugins
    from collie_core.run import Run


def write_config(run: Run) -> None:
    """`config.yaml`: every key as it was resolved."""
    import yaml

    text = yaml.safe_dump(run.config.to_mapping(), sort_keys=False, allow_unicode=True)
    write_text_atomic(run.output_dir / "config.yaml", text)


def write_run_json(run: Run, plugins: RunPlugins) -> None:
    """`run.json`: plugins, versions, hardware, and every `auto` as resolved."""
    import torch

    cuda = run.device.type == "cuda"
    content = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "plugins": plugins.provenance(),
        "versions": versions(),
        "hardware": {
            "device": str(run.device),
            "name": torch.cuda.get_device_name(run.device)
            if cuda
            else platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gib": round(torch.cuda.get_device_properties(run.device).total_memory / 2**30, 1)
            if cuda
            else None,
        },
        "world_size": run.world_size,
        "total_steps": run.total_steps,
        "resolved": run.resolved,
    }
    write_json_atomic(run.output_dir / "run.json", content)


def checkpoint_state(run: Run, position: Any, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: step, place in the data, random state of every process, config,
    autos; `model_path` is where the model lies, from whichever folder it is asked."""
    from collie_core.checkpoint.rng import rng_state
    from collie_core.together import gather

    path = run.config.model.path
    return {
        "step": run.step,
        "position": position,
        "data": data_fingerprint,
        "rng": gather(rng_state(), run.control),
        "config": run.config.to_mapping(),
        "model_path": str(Path(path).resolve()) if Path(path).is_dir() else path,
        "resolved": _merged(gather(run.resolved, run.control)),
        "provider": run.source.name if run.source else None,
    }


def _merged(resolved: list[dict[str, Any]]) -> dict[str, Any]:
    """The first process's autos; what each stretch of a pipeline has for itself is that of all."""
    key, found = "activation_checkpointing", dict(resolved[0])
    if isinstance(found.get(key), dict):
        found[key] = {stretch: number for one in resolved for stretch, number in one[key].items()}
    return found


def write_model_files(run: Run, folder: Path) -> None:
    """config.json, generation config and tokenizer, so that a checkpoint can be exported by itself."""
    assert run.source is not None
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run.source.hf_config, indent=2) + "\n")
    if (run.source.path / "generation_config.json").is_file():
        shutil.copy(run.source.path / "generation_config.json", folder)
    if run.tokenizer is not None:
        run.tokenizer.save_pretrained(str(folder))


def final_folder(run: Run) -> Path:
    """`model/`, where the result of a run is, whatever was trained."""
    from collie_core.models.sources import RESULT

    return run.output_dir / RESULT


def export_adapters(run: Run, layout: Layout) -> Path:
    """`model/`: the trained adapters in the layout of their libraries, published whole."""
    from collie_core.models.adapters import save_adapters

    tensors = dict(layout.full_tensors(run.added))
    if run.first:
        sections = getattr(layout.model, "base_sections", ())
        save_adapters(final_folder(run), run.added, tensors, sections)
    return final_folder(run)


def export_final(run: Run, provider: ModelProvider, layout: Layout) -> Path:
    """`model/`: the trained model in Hugging Face layout, published whole."""
    from collie_core.models.export import export_pretrained

    assert run.source is not None
    target = final_folder(run)
    if not run.first:
        for _ in layout.full_tensors():
            pass
        return target
    export_pretrained(
        target,
        provider,
        run.source.config,
        run.source.hf_config,
        layout.full_tensors(),
        source=run.source.path,
        tokenizer=run.tokenizer,
        replace=True,
    )
    return target
