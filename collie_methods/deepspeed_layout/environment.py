"""DeepSpeed as it is imported: on the right device, quiet on stdout, and with no file in the user's home."""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import UserError
from collie_core.launch.world import current_world

if TYPE_CHECKING:
    import torch


def import_deepspeed(device: torch.device) -> Any:
    """The module, for tensors on `device`; variables that the user has set are kept.

    Raises UserError where DS_ACCELERATOR asks for another device.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    chosen = os.environ.setdefault("DS_ACCELERATOR", kind)
    if chosen != kind:
        raise UserError(f"environment: DS_ACCELERATOR is {chosen!r}, but the run is on {kind}; unset it")
    # DeepSpeed asks for it where torchrun has not started the process
    local_rank = device.index or 0 if kind == "cuda" else current_world().local_rank
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_extensions())
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    # Which of its kernels may be compiled for communication: none.  On the CPU it would compile its
    # shared-memory all-reduce in every first run, for minutes, where gloo is at hand.
    ops.__compatible_ops__ = {}
    for handler in logger.handlers:  # stdout belongs to results
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
            handler.setLevel(logging.ERROR)
    # names that DeepSpeed's collectives use, and torch 2.13 is about to drop
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def _extensions() -> Path:
    """A folder of this user's own for kernels that DeepSpeed compiles; they are loaded from it again.

    Raises UserError where somebody else made it.
    """
    folder = Path(tempfile.gettempdir()) / f"collie-torch-extensions-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"{folder}: is not this user's own folder; set TORCH_EXTENSIONS_DIR")
    return folder
