"""What can be refused before processes are started: one message, and no time of many processes lost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from collie_core.config.checks import arithmetic, check_config, product
from collie_core.config.problems import ConfigProblems
from collie_core.config.schema import CollieConfig
from collie_core.errors import UserError


def check_devices(config: CollieConfig) -> None:
    """Refuse more processes than this machine has CUDA devices, where it has any."""
    import torch

    devices = torch.cuda.device_count()
    if 0 < devices < product(config):
        raise UserError(
            f"{arithmetic(config)} processes, but this machine has {devices} CUDA device"
            f"{'s' if devices > 1 else ''}; lower a size, or use more machines (collie slurm, torchrun)"
        )


def check_before_launch(config: CollieConfig, needed: Literal["train", "eval"] = "train") -> None:
    """The config, its plugins and their checks, the folders, the model's config and the data files.

    needed: the data that must be there; for `eval` those to train are not looked at.
    Raises UserErrors as the run itself would.
    """
    from collie_core.data.sources import open_sources, sections_of
    from collie_core.models.provider import select_provider
    from collie_core.train.resume import check_output_dir
    from collie_core.train.setup import check_run

    check_config(config, product(config))
    check_run(config)
    model = config.model
    if needed == "train":
        check_output_dir(Path(config.output_dir))
    select_provider(model.path, provider=model.provider, revision=model.revision, weights=False)
    if getattr(config.data, needed) is None:
        message = f"is required for {needed}: a file or folder of records"
        raise config.problems(ConfigProblems([(("data", needed), message)]))
    for split in ("train", "eval") if needed == "train" else ("eval",):
        for section in sections_of(getattr(config.data, split) or []):
            if not Path(section.path).exists():  # a name on the hub, or a mistake that this tells
                open_sources([section], split)
