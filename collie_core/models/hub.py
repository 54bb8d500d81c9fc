"""A model's folder: the one given, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from collie_core.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # never *.py: no code is ever run
#: the first kind that is there
_WEIGHTS = ["model*.safetensors", "adapter_model.safetensors"], ["pytorch_model*.bin"]


def resolve(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder at `path`, or that of a hub id, downloaded into huggingface_hub's cache where it is not yet.

    weights: fetch the weights too (safetensors rather than .bin).  Processes of one node share a download:
    huggingface_hub locks each file.  HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE are respected.
    Raises CheckpointError naming the id and the cache folder.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists():
        raise CheckpointError(f"{name}: is a file; expected a folder in Hugging Face layout or a hub id")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder")
    found = _download(name, revision, _SMALL_FILES)
    if weights:
        for patterns in _WEIGHTS:
            found = _download(name, revision, patterns)
            if any(file.match(pattern) for file in found.iterdir() for pattern in patterns):
                break
    return found


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except errors.GatedRepoError:
        cause = "its owner must grant access; ask on its page, then log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        cause = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        cause = f"{constants.ENDPOINT} has no such model, or it is private (log in with `hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = constants.HF_HUB_OFFLINE
        reason = (
            "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_line(error)})"
        )
        cause = f"{reason}, and the cache {constants.HF_HUB_CACHE} does not hold all of its files"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        cause = _line(error)
    where = f" at revision {revision}" if revision else ""
    raise CheckpointError(f"{name}{where}: no such folder, and as a hub id: {cause}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
