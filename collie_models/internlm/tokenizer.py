"""InternLM's tokenizers: sentencepiece BPE without a dummy prefix; `<s>` in front, once for a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from collie_core.plugin import CheckpointError
from collie_models.decoder.family_tokenizer import SentencePieceTokenizer, named_templates, special_flags
from collie_models.decoder.spm_tokenizer import (
    NAMED,
    backend_tokenizer,
    fast_tokenizer,
    read_json,
    read_sentencepiece,
    renamed_pieces,
    token_text,
)
from collie_models.internlm.template import TEMPLATES, TEMPLATES2

_FILES = ("tokenizer.model", "added_tokens.json", "special_tokens_map.json")
_AROUND = ("add_bos_token", "add_eos_token")
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


class InternLMTokenizer(SentencePieceTokenizer):
    """Decodes as the original did: a space before a special token, unless another one is before it."""

    stop_tokens = ("<eoa>",)

    def tokenize(self, text: str, *args: Any, **options: Any) -> list[str]:
        """The tokens of a text, special ones without the white space that they take from it."""
        special = set(self.all_special_tokens)
        tokens = super().tokenize(text, *args, **options)
        return [token.strip() if token.strip() in special else token for token in tokens]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The tokens of one text or two with `<s>` in front."""
        around = self("")["input_ids"]
        front = around[:1] if around[:1] == [self.bos_token_id] else []
        return [*front, *token_ids_0, *(token_ids_1 or []), *around[len(front) :]]

    def _settings_to_save(self, settings: dict[str, Any]) -> dict[str, Any]:
        # under a key of its own: given these, transformers would put a second <s> into pairs
        kept = {key: self.original_settings[key] for key in _AROUND if key in self.original_settings}
        return super()._settings_to_save(settings) | {"original": kept}

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        special = set(self.all_special_tokens)
        text, after_special = "", False
        words: list[str] = []
        for found in self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens):
            token = found or ""  # the embedding may have more rows than there are tokens
            if token in special:
                text += ("" if after_special else " ") + self.convert_tokens_to_string(words) + token
                words = []
            else:
                words.append(token)
            after_special = token in special
        return text + self.convert_tokens_to_string(words)


class InternLM2Tokenizer(InternLMTokenizer):
    """InternLM's, with the special tokens of the conversations."""

    stop_tokens = ("<|im_end|>",)


def load_tokenizer(folder: Path) -> InternLMTokenizer:
    """InternLM's tokenizer in a folder.  Raises CheckpointError for a missing or damaged file."""
    settings = _settings(folder)
    proto = _model(folder)
    backend = backend_tokenizer(proto)
    # special tokens stated as mere text drop the white space around them
    pieces = {piece.piece for piece in proto.pieces}
    stated = {token["content"] for token in read_json(folder / "tokenizer.json").get("added_tokens") or []}
    stated |= {token["content"] for token in (settings.get("added_tokens_decoder") or {}).values()}
    flags = special_flags(settings, (*NAMED, "additional_special_tokens"))
    backend.add_special_tokens(
        [
            AddedToken(token, lstrip=left, rstrip=right, normalized=False, special=True)
            for token, (left, right) in flags.items()
            if token in pieces and token not in stated
        ]
    )
    tokenizer = _finish(folder, backend, settings, InternLMTokenizer)
    own = tokenizer.chat_template
    default = "internlm-chat" if "<eoh>" in tokenizer.get_vocab() else "internlm-chat-v1.1"
    tokenizer.chat_template = named_templates(own, TEMPLATES, default)
    tokenizer.chat_adds_special_tokens = tokenizer.chat_template["default"] in TEMPLATES.values()
    return tokenizer


def load_tokenizer2(folder: Path) -> InternLM2Tokenizer:
    """InternLM2's tokenizer in a folder.  Raises CheckpointError for a missing or damaged file."""
    settings = _settings(folder)
    proto = _model(folder)
    names = renamed_pieces(folder, settings, proto)
    backend = backend_tokenizer(proto, names=names)
    tokenizer = _finish(folder, backend, settings, InternLM2Tokenizer)
    tokenizer.chat_template = named_templates(tokenizer.chat_template, TEMPLATES2, "internlm2-chat")
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json")
    original = config.get("original")
    settings = config | read_json(folder / "special_tokens_map.json")
    settings |= original if isinstance(original, dict) else {}
    missing = {key: text for key, text in _DEFAULTS.items() if token_text(settings.get(key)) is None}
    return settings | missing


def _model(folder: Path) -> Any:
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer: expected tokenizer.model")
    return read_sentencepiece(path)


def _finish(folder: Path, backend: Any, settings: dict[str, Any], cls: type[InternLMTokenizer]) -> Any:
    after = [str(token_text(settings["eos_token"]))] if settings.get("add_eos_token") else []
    tokenizer: Any = fast_tokenizer(
        folder, backend, settings, padding_side="right", pair=([], after), cls=cls
    )
    tokenizer.keep(folder, _FILES, settings)
    return tokenizer
