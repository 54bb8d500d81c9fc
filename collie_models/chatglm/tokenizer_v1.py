"""ChatGLM-6B's tokenizer: sentencepiece, with tokens for lines, tabs and runs of spaces; `[gMASK] <sop>`.

A text becomes `text [gMASK] <sop>`, a prompt with its answer `prompt [gMASK] <sop> answer <eop>`.  What is
before `<sop>` is the prefix, seen from both sides; what follows has positions of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collie_core.plugin import CheckpointError
from collie_models.chatglm.template import TEMPLATES
from collie_models.decoder.family_tokenizer import (
    Piece,
    PythonTokenizer,
    named_templates,
    special_flags,
    split_at_tokens,
)
from collie_models.decoder.spm_tokenizer import chat_template, read_json, token_text

_FILE = "ice_text.model"
_DEFAULTS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}
_WHITE = re.compile(r"\n|\t| {2,80}")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")
_IMAGE = re.compile(r"<image_(\d+)>\Z")


class ChatGLMTokenizer(PythonTokenizer):
    """attention_mask is (batch, seq), 1 for a token, position_ids (batch, 2, seq), as the model takes them.

    full_attention_mask: give the original's attention_mask instead, (batch, 1, seq, seq), true where a token
    is not seen.
    """

    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    chat_adds_special_tokens = True
    full_attention_mask = False

    def __init__(self, model: Any, settings: Mapping[str, Any], **options: Any) -> None:
        self._model = model
        self._shift = int(settings.get("num_image_tokens", 20000))
        self.gmask_token = token_text(settings.get("gmask_token")) or "[gMASK]"
        self.end_token = token_text(settings.get("end_token")) or "</s>"
        self._stripping = special_flags(settings, (*_DEFAULTS, "additional_special_tokens"))
        longest_first = sorted(self._stripping, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Image tokens of older checkpoints, and the pieces of the sentencepiece model."""
        return self._shift + len(self._model)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {self._convert_id_to_token(index): index for index in range(self.vocab_size)}

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`, in whose place the answer stands."""
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """The id of `</s>`, which ends documents."""
        return self._convert_token_to_id(self.end_token)

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of a text, those that it spells out included."""
        found: list[Piece] = []
        for words, start, _ in split_at_tokens(text, self._special, self._stripping):
            if words in self._stripping:
                found.append((words, start, start + len(words)))
            else:
                found += self._split(words, start)
        return found

    def tokenize(self, text: str, *args: Any, **options: Any) -> list[str]:
        """The tokens of `pieces`, without the work of finding their characters."""
        found: list[str] = []
        for words, _, _ in split_at_tokens(text, self._special, self._stripping):
            if words in self._stripping:
                found.append(words)
            else:
                found += self._model.encode(_WHITE.sub(_white_token, words), out_type=str)
        return found

    def _split(self, text: str, offset: int) -> list[Piece]:
        """The sentencepieces of a text without special tokens, whose first character is at `offset`."""
        origin: list[tuple[int, int]] = []  # of each byte of what is written
        last = 0
        for match in _WHITE.finditer(text):
            start, end = match.span()
            origin += _characters(text[last:start], offset + last)
            origin += [(offset + start, offset + end)] * len(_white_token(match))
            last = end
        origin += _characters(text[last:], offset + last)
        found: list[Piece] = []
        for piece in self._model.encode(_WHITE.sub(_white_token, text), return_type="proto").pieces:
            begin, end = piece.begin, piece.end
            if begin < end:
                found.append((piece.piece, origin[begin][0], origin[end - 1][1]))
            else:  # the dummy prefix, or the bytes of a character before its last one
                place = origin[begin][0] if begin < len(origin) else offset + len(text)
                found.append((piece.piece, place, place))
        for index in range(len(found) - 2, -1, -1):
            token, start, end = found[index]
            if start == end and _BYTE.match(token) and _BYTE.match(found[index + 1][0]):
                found[index] = (token, *found[index + 1][1:])
        return found

    def _convert_token_to_id(self, token: str) -> int:
        if self._shift and (image := _IMAGE.match(token)) and int(image.group(1)) < self._shift:
            return int(image.group(1))
        return int(self._model.piece_to_id(token)) + self._shift

    def _convert_id_to_token(self, index: int) -> str:
        if index < self._shift:
            return f"<image_{index}>"
        if index >= self.vocab_size:
            return ""  # a row of the embedding without a token
        return str(self._model.id_to_piece(index - self._shift))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, with lines, tabs and runs of spaces again."""
        text = str(self._model.decode_pieces(tokens)) if tokens else ""
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda match: " " * int(match.group(1)), text)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        ids = [index for index in ids if index != self.pad_token_id]
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        return self.convert_tokens_to_string(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """text [gMASK] <sop>, or prompt [gMASK] <sop> answer <eop>."""
        built = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return built if token_ids_1 is None else [*built, *token_ids_1, self.eos_token_id]

    def training_tokens(
        self, text: str, answers: Sequence[tuple[int, int]], chat: bool
    ) -> tuple[list[int], list[bool]]:
        """What a record becomes, and which of its tokens are trained: those of the last answer.

        Earlier answers of a conversation are part of the prefix, in which a token sees those after it.
        """
        start = answers[-1][0]
        prompt = [self._convert_token_to_id(token) for token in self.tokenize(text[:start])]
        answer = [self._convert_token_to_id(token) for token in self.tokenize(text[start:])]
        prefix = [*prompt, self.gmask_token_id, self.bos_token_id]
        return prefix + answer, [False] * len(prefix) + [True] * len(answer)

    def _settings_to_save(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = super()._settings_to_save(settings)
        settings.pop("added_tokens_decoder", None)  # the sentencepiece model has them
        named = {"gmask_token": self.gmask_token, "end_token": self.end_token}
        return {**settings, **named, "num_image_tokens": self._shift}

    def _pad(self, encoded_inputs: Any, *args: Any, **options: Any) -> dict[str, Any]:
        for key in ("position_ids", "attention_mask"):
            encoded_inputs.pop(key, None)
        options.pop("return_attention_mask", None)
        padded = super()._pad(encoded_inputs, *args, return_attention_mask=True, **options)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        padded["position_ids"] = self._positions(ids, mask)
        if self.full_attention_mask:
            padded["attention_mask"] = self._full_mask(ids, mask)
        return padded

    def _prefix(self, ids: Sequence[int]) -> int:
        """How many tokens are seen from both sides: those before the first <sop>."""
        return ids.index(self.bos_token_id) if self.bos_token_id in ids else len(ids)

    def _positions(self, ids: list[int], mask: list[int]) -> list[list[int]]:
        """Positions in the prefix, where the answer stays at its mask token; and positions in the answer."""
        first = mask.index(1) if 1 in mask else len(ids)
        tokens = [index for index, real in zip(ids, mask, strict=True) if real]
        prefix = self._prefix(tokens)
        place = self.mask_token_id if self.mask_token_id in tokens else self.gmask_token_id
        rest = [tokens.index(place)] if place in tokens else range(prefix, len(tokens))
        size = len(tokens) - prefix
        whole = [*range(prefix), *(list(rest) * size if place in tokens else rest)]
        block = [0] * prefix + list(range(1, size + 1))
        left, right = [0] * first, [0] * (len(ids) - first - len(tokens))
        return [left + whole + right, left + block + right]

    def _full_mask(self, ids: list[int], mask: list[int]) -> list[list[list[bool]]]:
        tokens = [index for index, real in zip(ids, mask, strict=True) if real]
        first = mask.index(1) if 1 in mask else len(ids)
        seen = first + self._prefix(tokens)  # before it every token is seen
        real = [bool(value) for value in mask]
        rows = range(len(ids))
        return [
            [
                [not (real[row] and real[column] and (column <= row or column < seen)) for column in rows]
                for row in rows
            ]
        ]


def _white_token(match: re.Match[str]) -> str:
    """The token for a line, a tab, or a run of spaces."""
    return {"\n": "<n>", "\t": "<|tab|>"}.get(match.group(), f"<|blank_{len(match.group())}|>")


def _characters(text: str, offset: int) -> list[tuple[int, int]]:
    """The character that each byte of a text belongs to, as (start, end)."""
    spans = [(index, index + 1) for index in range(offset, offset + len(text))]
    if text.isascii():
        return spans
    return [span for span, letter in zip(spans, text, strict=True) for _ in letter.encode()]


def load_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """The tokenizer in a folder.  Raises CheckpointError for a missing or damaged file, or lost tokens."""
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    for key in ("remove_space", "do_lower_case"):
        if settings.get(key):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {key}: expected false")
    named = {key: token_text(settings.get(key)) or text for key, text in _DEFAULTS.items()}
    settings = {key: settings.get(key) or text for key, text in _DEFAULTS.items()} | settings
    model = read_model(folder / _FILE)
    pieces = {model.id_to_piece(index) for index in range(len(model))}
    for token in (*named.values(), "<n>"):
        if token not in pieces:
            raise CheckpointError(f"{folder / _FILE}: has no token {token!r}")
    tokenizer = ChatGLMTokenizer(
        model,
        settings,
        **named,
        padding_side=settings.get("padding_side") or "left",
        model_max_length=settings.get("model_max_length") or int(1e30),
    )
    tokenizer.chat_template = named_templates(chat_template(folder, settings), TEMPLATES, "chatglm")
    tokenizer.keep(folder, (_FILE, "special_tokens_map.json"), settings)
    return tokenizer


def read_model(path: Path) -> Any:
    """The sentencepiece model in a file.  Raises CheckpointError where there is none."""
    import sentencepiece

    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no tokenizer: expected {path.name}")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: is no sentencepiece model: {error}") from None
    return model
