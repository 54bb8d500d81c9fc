"""LLaMA's tokenizers: sentencepiece (LLaMA 1 and 2, OpenLLaMA, Mistral), tokenizer.json (LLaMA 3, Qwen)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.plugin import CheckpointError
from collie_models.decoder.spm_tokenizer import (
    backend_tokenizer,
    fast_tokenizer,
    read_json,
    read_sentencepiece,
    renamed_pieces,
    token_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, with character offsets; no code of the folder is run.

    tokenizer.model goes before tokenizer.json: automatic conversions of OpenLLaMA's give other ids.
    Raises CheckpointError where neither is there, or the file is damaged.
    """
    settings = read_json(folder / "tokenizer_config.json")
    model, complete = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        try:
            proto = read_sentencepiece(model)
        except CheckpointError:
            if not complete.is_file():  # LLaMA 3 keeps tiktoken's file of the same name beside
                raise
        else:
            settings = _special_tokens(folder, settings)
            names = renamed_pieces(folder, settings, proto)
            backend = backend_tokenizer(proto, settings.get("legacy", True), names)
            return fast_tokenizer(folder, backend, settings)
    if not complete.is_file():
        raise CheckpointError(f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json")
    return read_tokenizer_json(folder)


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose special tokens are those of LLaMA where early folders leave them out or empty."""
    settings = read_json(folder / "special_tokens_map.json") | settings
    for key, default in _DEFAULTS.items():
        if token_text(settings.get(key)) is None:
            if key in settings:
                _log.warning("%s: %s is empty in tokenizer_config.json; %r is used", folder, key, default)
            settings = settings | {key: default}
    return settings


def read_tokenizer_json(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder's tokenizer.json.  Raises CheckpointError where it is absent or damaged."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer: expected tokenizer.json")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise CheckpointError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from None
    return tokenizer
