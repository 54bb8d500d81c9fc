"""MOSS's tokenizer: GPT-2's byte-level BPE, with tokens for runs of spaces and tabs.

The original cuts a text at its added tokens first, and those for white space swallow the white space around
them, lines included: `x:\\n    y` has no line break.  The model was trained on that, so it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collie_core.plugin import CheckpointError
from collie_models.decoder.family_tokenizer import (
    Piece,
    PythonTokenizer,
    named_templates,
    special_flags,
    split_at_tokens,
)
from collie_models.decoder.spm_tokenizer import NAMED, chat_template, read_json, token_text
from collie_models.moss.template import TEMPLATES

_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_DEFAULTS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


class MossTokenizer(PythonTokenizer):
    """Adds no tokens around a text, and has no padding token until one is set."""

    model_input_names = ["input_ids", "attention_mask"]
    stop_tokens = ("<eom>", "<eoc>")  # the answer's end, and the commands', whose results are awaited

    def __init__(
        self,
        backend: Tokenizer,
        added: Mapping[str, int],
        stripping: Mapping[str, tuple[bool, bool]],
        **options: Any,
    ) -> None:
        self._backend, self._added, self._stripping = backend, dict(added), dict(stripping)
        self._names = {index: token for token, index in added.items()}
        self._size = len({**backend.get_vocab(with_added_tokens=False), **added})
        longest_first = sorted(stripping, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Size of vocab.json, without the added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._size

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {**self._backend.get_vocab(with_added_tokens=False), **self._added}

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text, added ones included."""
        found: list[Piece] = []
        for words, start, end in split_at_tokens(text, self._tokens, self._stripping):
            if words in self._stripping:
                found.append((words, start, end))
            else:
                encoded = self._backend.encode(words, add_special_tokens=False)
                spans = zip(encoded.tokens, encoded.offsets, strict=True)
                found += [(token, first + start, last + start) for token, (first, last) in spans]
        return found

    def _convert_token_to_id(self, token: str) -> int | None:
        index = self._added.get(token)
        index = self._backend.token_to_id(token) if index is None else index
        return self._backend.token_to_id(str(self.unk_token)) if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        # the embedding has more rows than there are tokens
        return self._names.get(index) or self._backend.id_to_token(index) or ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens that are none of the added ones."""
        return str(self._backend.decoder.decode(tokens)) if tokens else ""

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **options: Any) -> str:
        """As the original: a space on either side of each added token."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        parts: list[str] = []
        words: list[str] = []
        for token in self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens):
            if token in self._added:
                parts += [*([self.convert_tokens_to_string(words)] if words else []), token]
                words = []
            else:
                words.append(token)
        return " ".join([*parts, *([self.convert_tokens_to_string(words)] if words else [])])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The tokens as they are."""
        return [*token_ids_0, *(token_ids_1 or [])]

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Also a tokenizer.json, which differs where runs of white space touch each other."""
        saved = super().save_pretrained(save_directory, *args, **options)
        self._stock().backend_tokenizer.save(str(Path(save_directory) / "tokenizer.json"))
        return saved

    def _settings_to_save(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super()._settings_to_save(settings)
        settings.pop("added_tokens_decoder", None)
        return settings | {"tokenizer_class": "PreTrainedTokenizerFast"}

    def _stock(self) -> PreTrainedTokenizerFast:
        """What stock transformers makes of the same vocabulary."""
        backend = Tokenizer.from_str(self._backend.to_str())
        special = set(self.all_special_tokens)
        for token, _ in sorted(self._added.items(), key=lambda item: item[1]):
            left, right = self._stripping[token]
            entry = AddedToken(token, lstrip=left, rstrip=right, normalized=False, special=token in special)
            (backend.add_special_tokens if token in special else backend.add_tokens)([entry])
        named = {key: getattr(self, key) for key in NAMED if getattr(self, key) is not None}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def load_tokenizer(folder: Path) -> MossTokenizer:
    """The tokenizer in a folder.  Raises CheckpointError for a missing or damaged file."""
    config = read_json(folder / "tokenizer_config.json")
    settings = config | read_json(folder / "special_tokens_map.json")
    if settings.get("add_prefix_space"):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: add_prefix_space: expected false")
    settings |= {key: text for key, text in _DEFAULTS.items() if token_text(settings.get(key)) is None}
    backend = _backend(folder)
    added = read_json(folder / "added_tokens.json")
    for token, index in added.items():
        if not isinstance(index, int):
            raise CheckpointError(
                f"{folder / 'added_tokens.json'}: {token!r}: expected an id, found {index!r}"
            )
    flags = special_flags(settings, (*NAMED, "additional_special_tokens"))
    known = {**backend.get_vocab(), **added}
    for token in flags:
        if token not in known:
            raise CheckpointError(f"{folder}: vocab.json and added_tokens.json have no token {token!r}")
    named = {key: text for key in NAMED if (text := token_text(settings.get(key))) is not None}
    others = settings.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    tokenizer = MossTokenizer(
        backend,
        added,
        dict.fromkeys(added, (True, True)) | flags,
        **named,
        extra_special_tokens=[str(token_text(token)) for token in others],
        padding_side=settings.get("padding_side") or "right",
        model_max_length=settings.get("model_max_length") or int(1e30),
    )
    tokenizer.chat_template = named_templates(chat_template(folder, settings), TEMPLATES, "moss-sft")
    tokenizer.keep(folder, _FILES, settings)
    return tokenizer


def _backend(folder: Path) -> Tokenizer:
    """Byte-level BPE of vocab.json and merges.txt."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise CheckpointError(f"{folder}: no tokenizer: expected {path.name}")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        rules = [line for line in lines if line.strip() and not line.startswith("#version")]
        pairs = [(left, right) for left, _, right in (rule.partition(" ") for rule in rules)]
        backend = Tokenizer(models.BPE(read_json(vocabulary), pairs))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{merges}: does not fit {vocabulary.name}: {error}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
