"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: sentencepiece BPE with `[gMASK] sop` in front.

Special tokens stand after the sentencepiece model's; no text is ever split into them, and they are nothing
in decoded text.  ChatGLM3's roles are found in the text that its chat template made, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers.tokenization_utils_base import BatchEncoding

from collie_core.plugin import CheckpointError
from collie_models.chatglm.template import TEMPLATES2, TEMPLATES3
from collie_models.decoder.family_tokenizer import SentencePieceTokenizer, named_templates
from collie_models.decoder.spm_tokenizer import (
    backend_tokenizer,
    fast_tokenizer,
    read_json,
    read_sentencepiece,
    surround,
)

_FILE = "tokenizer.model"
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_PREFIX = ("[gMASK]", "sop")
_SILENT = ("<unk>", "<s>", "</s>", *_SPECIAL)  # nothing in decoded text


class ChatGLM2Tokenizer(SentencePieceTokenizer):
    """Gives position_ids (batch, seq), counted from the first token that is no padding."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    stop_tokens = ("<|user|>", "<|observation|>")
    chat_adds_special_tokens = True

    @property
    def unk_token_id(self) -> None:
        """None, as in the original, where `<unk>` is the padding token alone."""
        return None

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, those that no text is split into included."""
        return [*_SILENT, *(role for role in _ROLES if self._has_roles)]

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        return [self.get_command(token) for token in self.all_special_tokens]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop text, or [gMASK] sop prompt answer </s>."""
        built = [*self.get_prefix_tokens(), *token_ids_0]
        return built if token_ids_1 is None else [*built, *token_ids_1, self.get_command("<eos>")]

    def get_prefix_tokens(self) -> list[int]:
        """The ids of [gMASK] and sop, which begin every text."""
        return [self.get_command(name) for name in _PREFIX]

    def get_command(self, token: str) -> int:
        """The id of a special token; `<bos>`, `<eos>` and `<pad>` stand for `<s>`, `</s>` and `<unk>`."""
        token = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"}.get(token, token)
        index = self.backend_tokenizer.token_to_id(token) if token in (*_SILENT, *_ROLES) else None
        if index is None:
            raise ValueError(f"{token!r} is no special token of this tokenizer")
        return index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The tokens; a special one is "", as in the original."""
        if isinstance(ids, int):
            return self.convert_ids_to_tokens([ids])[0]
        silent = {self.get_command(token) for token in _SILENT}
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        ids = [int(index) for index in ids if int(index) not in skipped]
        tokens = super().convert_ids_to_tokens(ids)
        return ["" if index in silent else token or "" for index, token in zip(ids, tokens, strict=True)]

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *args: Any, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def encode_chat(self, text: Any, **options: Any) -> BatchEncoding:
        """The tokens of a text that the chat template made, ChatGLM3's roles among them."""
        found: BatchEncoding = self(text, split_special_tokens=not self._has_roles, **options)
        return found

    @property
    def _has_roles(self) -> bool:
        return self.backend_tokenizer.token_to_id(_ROLES[1]) is not None

    def training_tokens(
        self, text: str, answers: Sequence[tuple[int, int]], chat: bool
    ) -> tuple[list[int], list[bool]]:
        """What a record becomes, and which of its tokens are trained.

        As in the original, prompt and last answer are tokenised apart, so the answer gets its dummy prefix.
        """
        start = answers[-1][0]
        if not start or (chat and self._has_roles):
            found = (
                self.encode_chat(text, return_offsets_mapping=True)
                if chat
                else self(text, return_offsets_mapping=True)
            )
        else:
            found = self(text[:start], text[start:], return_offsets_mapping=True)
        trained = []
        for sequence, (begin, end) in zip(found.sequence_ids(0), found["offset_mapping"], strict=True):
            begin, end = (begin + start, end + start) if sequence == 1 else (begin, end)
            inside = any(first < end and begin < last for first, last in answers)
            trained.append(sequence == 1 or (sequence == 0 and inside))
        return list(found["input_ids"]), trained

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **options: Any) -> BatchEncoding:
        if text_pair == "" and isinstance(text, str):  # transformers would take it for no pair
            text, text_pair = [text], [text_pair]
            batch = self._encode_plus(text, text_pair, *args, **options)
            if options.get("return_tensors") is not None:
                return batch
            return BatchEncoding({key: value[0] for key, value in batch.items()}, batch.encodings)
        found: BatchEncoding = super()._encode_plus(text, text_pair, *args, **options)
        if "attention_mask" in found and "position_ids" not in found:
            found["position_ids"] = _positions(found["attention_mask"])
        return found

    def pad(self, encoded_inputs: Any, *args: Any, **options: Any) -> BatchEncoding:
        """As in transformers; position_ids are counted anew."""
        if isinstance(encoded_inputs, list | tuple):
            encoded_inputs = {key: [one[key] for one in encoded_inputs] for key in encoded_inputs[0]}
        inputs = {key: value for key, value in encoded_inputs.items() if key != "position_ids"}
        found: BatchEncoding = super().pad(inputs, *args, **options)
        found["position_ids"] = _positions(found["attention_mask"])
        return found


def _positions(mask: Any) -> Any:
    """Positions for a mask: a list of 0 and 1, a list of such lists, or an array or tensor of them."""
    if not isinstance(mask, list):
        counted = mask.cumsum(-1) - 1
        return counted * (counted > 0)
    if mask and isinstance(mask[0], list):
        return [_positions(row) for row in mask]
    before = mask.index(1) if 1 in mask else len(mask)
    return [0] * before + list(range(len(mask) - before))


def load_tokenizer2(folder: Path) -> ChatGLM2Tokenizer:
    """The tokenizer in a folder.  Raises CheckpointError for a missing or damaged file."""
    path = folder / _FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer: expected {_FILE}")
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("remove_space", "do_lower_case"):
        if settings.get(key):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {key}: expected false")
    proto = read_sentencepiece(path)
    roles = _ROLES if _is_version_3(folder, settings) else ()
    names = dict(enumerate((*_SPECIAL, *roles), start=len(proto.pieces)))
    backend = backend_tokenizer(proto, names=names, silent=_SILENT)
    backend.add_special_tokens([AddedToken(role, normalized=False, special=True) for role in roles])
    stated = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    kept = {key: settings[key] for key in ("model_max_length", "padding_side") if settings.get(key)}
    tokenizer: Any = fast_tokenizer(
        folder, backend, stated | kept, cls=ChatGLM2Tokenizer, split_special_tokens=True
    )
    tokenizer.backend_tokenizer.post_processor = surround(backend, [*_PREFIX], [], ([], ["</s>"]))
    own = tokenizer_template(folder, settings)
    family, default = (TEMPLATES3, "chatglm3") if roles else (TEMPLATES2, "chatglm2")
    tokenizer.chat_template = named_templates(own, family, default)
    tokenizer.keep(folder, (_FILE,), settings)
    return tokenizer


def tokenizer_template(folder: Path, settings: Any) -> Any:
    """The folder's chat template, unless it spells out the tokens that the tokenizer puts in front."""
    from collie_models.decoder.spm_tokenizer import chat_template

    own = chat_template(folder, settings)
    return None if isinstance(own, str) and "[gMASK]" in own else own


def _is_version_3(folder: Path, settings: Any) -> bool:
    """ChatGLM3's first folders differ from ChatGLM2's in their names alone."""
    known = str(settings.get("added_tokens_decoder", "")) + str(settings.get("additional_special_tokens", ""))
    known += str(read_json(folder / "tokenizer.json").get("added_tokens", ""))
    if _ROLES[1] in known:
        return True
    named = (
        settings.get("name_or_path"),
        read_json(folder / "config.json").get("_name_or_path"),
        folder.name,
    )
    return any("chatglm3" in str(name).lower() for name in named)
