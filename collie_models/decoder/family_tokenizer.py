"""What the families' tokenizers add to transformers' classes: chat formats, stop tokens, saving, offsets."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from collie_core.plugin import UserError
from collie_models.decoder.spm_tokenizer import NAMED, token_text

Piece = tuple[str, int, int]  # a token and the characters (start, end) that it stands for


class FamilyTokenizer(PreTrainedTokenizerBase):
    """A tokenizer that saves the original's files beside its own, and knows its family's chat formats.

    stop_tokens: end an answer of the chat formats, beside the end-of-sequence token.
    chat_adds_special_tokens: a text of its chat template gets the tokens that any text gets, such as a BOS;
    false where the template writes them itself.
    """

    stop_tokens: tuple[str, ...] = ()
    chat_adds_special_tokens: bool = False
    original_files: Mapping[str, bytes] = {}
    original_settings: Mapping[str, Any] = {}

    def keep(self, folder: Path, names: Iterable[str], settings: Mapping[str, Any]) -> None:
        """Remember the files that `save_pretrained` writes again, and the folder's settings."""
        self.original_files = {
            name: (folder / name).read_bytes() for name in names if (folder / name).is_file()
        }
        self.original_settings = dict(settings)
        self.name_or_path = str(folder)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of those of `stop_tokens` that the vocabulary has."""
        vocabulary = self.get_vocab() if self.stop_tokens else {}
        return [vocabulary[token] for token in self.stop_tokens if token in vocabulary]

    def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        """As in transformers; the text of the template is tokenised as the family's original does it."""
        if not (options.get("tokenize", True) and self.chat_adds_special_tokens):
            return super().apply_chat_template(conversation, *args, **options)
        as_dict = options.pop("return_dict", True)
        keys = ("padding", "truncation", "max_length", "return_tensors")
        calling = {key: options.pop(key) for key in keys if key in options}
        calling |= options.pop("tokenizer_kwargs", None) or {}
        options["tokenize"] = False
        text = super().apply_chat_template(conversation, *args, **options)
        found = self.encode_chat(text, **calling)
        return found if as_dict else found["input_ids"]

    def encode_chat(self, text: Any, **options: Any) -> BatchEncoding:
        """The tokens of a text (or texts) that the chat template made."""
        found: BatchEncoding = self(text, **options)
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """A folder from which both this family's loader and, where one can, transformers load it."""
        saved = super().save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        path = folder / "tokenizer_config.json"
        settings = self._settings_to_save(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n", "utf-8")
        for name, content in self.original_files.items():
            (folder / name).write_bytes(content)
        return saved

    def _settings_to_save(self, settings: dict[str, Any]) -> dict[str, Any]:
        """transformers' tokenizer_config.json, with what the original's said of its special tokens."""
        if self.is_fast:
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in NAMED:
            original = self.original_settings.get(key)
            if isinstance(original, Mapping) and token_text(original) == settings.get(key):
                settings[key] = {"__type": "AddedToken", **original}
        return settings


class SentencePieceTokenizer(FamilyTokenizer, PreTrainedTokenizerFast):
    """A fast tokenizer made from `tokenizer.model`, which sentencepiece itself decodes.

    Where a text's bytes are no characters `tokenizers` gives up the characters beside them too.
    """

    @cached_property
    def _model(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.original_files["tokenizer.model"])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, without the dummy prefix."""
        return str(self._model.decode_pieces(tokens)) if tokens else ""


class PythonTokenizer(FamilyTokenizer, PreTrainedTokenizer, ABC):
    """A tokenizer in Python, for what `tokenizers` cannot do, that knows the characters of its tokens.

    Its vocabulary is the checkpoint's: `add_tokens` raises UserError for others.
    """

    @abstractmethod
    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text, special tokens found in it included."""

    @abstractmethod
    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""

    def tokenize(self, text: str, *args: Any, **options: Any) -> list[str]:
        """The tokens of a text, without those that are added around it."""
        return [token for token, _, _ in self.pieces(text)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and (start, end) characters, special tokens around the text as (0, 0)."""
        found = self(text, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        vocabulary = self.get_vocab()
        for token in new_tokens or []:
            if str(token) not in vocabulary:
                raise UserError(f"{type(self).__name__}: {str(token)!r} is not in its vocabulary")
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **options: Any) -> BatchEncoding:
        wanted = options.get("return_offsets_mapping", False)
        if not isinstance(text, str):
            return super()._encode_plus(text, text_pair, *args, **options)
        options.pop("return_offsets_mapping", None)
        found: BatchEncoding = super()._encode_plus(text, text_pair, *args, **options)
        if wanted:
            if text_pair is not None or options.get("return_tensors") is not None:
                raise UserError("return_offsets_mapping needs single texts, without return_tensors")
            found["offset_mapping"] = self._offsets(text, found["input_ids"], options)
        return found

    def _offsets(self, text: str, ids: list[int], options: Mapping[str, Any]) -> list[tuple[int, int]]:
        """The characters of each of `ids`, which may be cut, padded, and have special tokens around."""
        spans = [(start, end) for _, start, end in self.pieces(text)]
        before, after = [], []
        if options.get("add_special_tokens", True):
            mark = -1
            built = self.build_inputs_with_special_tokens([mark])
            before, after = built[: built.index(mark)], built[built.index(mark) + 1 :]
        padding = max(len(ids) - len(spans) - len(before) - len(after), 0)
        kept = len(ids) - padding - len(before) - len(after)
        spans = spans[:kept] if self.truncation_side == "right" else spans[len(spans) - kept :]
        spans = [(0, 0)] * len(before) + spans + [(0, 0)] * len(after)
        pads = [(0, 0)] * padding
        return pads + spans if (options.get("padding_side") or self.padding_side) == "left" else spans + pads

    def _pad(self, encoded_inputs: Any, *args: Any, **options: Any) -> dict[str, Any]:
        before = len(encoded_inputs["input_ids"])
        padded: dict[str, Any] = super()._pad(encoded_inputs, *args, **options)
        if "offset_mapping" in padded and len(padded["offset_mapping"]) == before:
            pads = [(0, 0)] * (len(padded["input_ids"]) - before)
            left = (options.get("padding_side") or self.padding_side) == "left"
            spans = list(padded["offset_mapping"])
            padded["offset_mapping"] = pads + spans if left else spans + pads
        return padded


def split_at_tokens(text: str, tokens: Any, stripping: Mapping[str, tuple[bool, bool]]) -> list[Piece]:
    """The text cut at tokens, as transformers' tokenizers in Python did it until version 4.33.

    tokens: a compiled pattern of the tokens, the longest first.  stripping: (left, right) of each: whether
    the white space on that side of it is dropped.  A stripped neighbour that is a token itself vanishes.
    """
    cut: list[Piece] = []
    last = 0
    for match in tokens.finditer(text):
        cut += [(text[last : match.start()], last, match.start()), (match.group(), *match.span())]
        last = match.end()
    cut = [piece for piece in [*cut, (text[last:], last, len(text))] if piece[0]]
    for index, (token, _, _) in enumerate(cut):
        if token not in stripping:
            continue
        left, right = stripping[token]
        if right and index + 1 < len(cut):
            words, _, end = cut[index + 1]
            words = words.lstrip()
            cut[index + 1] = (words, end - len(words), end)
        if left and index > 0:
            words, start, _ = cut[index - 1]
            words = words.rstrip()
            cut[index - 1] = (words, start, start + len(words))
    return [piece for piece in cut if piece[0]]


def named_templates(
    own: str | dict[str, str] | None, family: Mapping[str, str], default: str
) -> dict[str, str]:
    """The family's chat templates by name; `default` is the folder's own where it has one."""
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    return {**family, "default": family[default], **named}


def special_flags(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """(left, right) white space that each special token drops: all where it is stated as text alone."""
    flags: dict[str, tuple[bool, bool]] = {}
    for key in keys:
        stated = settings.get(key) or []
        for token in stated if isinstance(stated, list) else [stated]:
            text = token_text(token)
            if text is None:
                continue
            if isinstance(token, Mapping):
                flags[text] = (bool(token.get("lstrip")), bool(token.get("rstrip")))
            else:
                flags.setdefault(text, (True, True))
    return flags
