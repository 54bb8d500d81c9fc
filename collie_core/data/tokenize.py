"""Texts to tokens and the mask of what is trained, from one tokenisation with character offsets.

Lengths of separately tokenised parts are never added up: a token that reaches over the seam between
prompt and answer would shift the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collie_core.data.records import IGNORED, Rendered, Tokens
from collie_core.data.sources import BadRecord
from collie_core.errors import DataError

Encoded = tuple[list[int], list[tuple[int, int]]]


class Tokenize:
    """Turns rendered records into tokens with the run's tokenizer.

    The tokenizer is a fast one of transformers, or offers `encode_with_offsets(text) -> (ids, offsets)`,
    offsets being a (start, end) of characters for each id and (0, 0) for ids that stand for no character.
    One whose model wants more than one tokenisation of the text, such as tokens between prompt and answer,
    offers `training_tokens(text, answers, chat) -> (ids, trained)`, a bool for each id; chat: its own chat
    template made the text.  `stop_token_ids` end an answer like the end-of-sequence token, and
    `chat_adds_special_tokens` says that texts of its chat template get the tokens that any text gets.
    Raises DataError for a tokenizer that gives no offsets, or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ends = {tokenizer.eos_token_id, *getattr(tokenizer, "stop_token_ids", ())}
        self._chat_adds = bool(getattr(tokenizer, "chat_adds_special_tokens", False))
        self._name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self._special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)

    def __call__(self, rendered: Sequence[Rendered]) -> list[Tokens | BadRecord]:
        """The tokens of each record, or what is wrong with it."""
        if hasattr(self._tokenizer, "training_tokens"):
            return [self._by_tokenizer(one) for one in rendered]
        encoded: dict[int, Encoded] = {}
        for complete in (False, True):
            texts = {
                index: one.text
                for index, one in enumerate(rendered)
                if one.complete == complete and _encodable(one.text)
            }
            encoded.update(
                zip(texts, self._encode(list(texts.values()), not complete or self._chat_adds), strict=True)
            )
        results: list[Tokens | BadRecord] = []
        for index, one in enumerate(rendered):
            try:
                if index not in encoded:
                    raise _half_a_character()
                results.append(self._mask(one, *encoded[index]))
            except BadRecord as bad:
                results.append(bad)
        return results

    def _by_tokenizer(self, one: Rendered) -> Tokens | BadRecord:
        if not _encodable(one.text):
            return _half_a_character()
        ids, trained = self._tokenizer.training_tokens(one.text, one.answers, one.complete)
        try:
            return self._finish(one, np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool))
        except BadRecord as bad:
            return bad

    def _encode(self, texts: list[str], special_tokens: bool) -> list[Encoded]:
        if not texts:
            return []
        if hasattr(self._tokenizer, "encode_with_offsets"):
            return [self._tokenizer.encode_with_offsets(text) for text in texts]
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                f"tokenizer {self._name} gives no character offsets, which the loss mask needs: use a fast "
                "tokenizer (a folder with tokenizer.json), or one with encode_with_offsets(text)"
            )
        found = self._tokenizer(
            texts,
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _mask(self, one: Rendered, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Tokens:
        tokens = np.asarray(ids, dtype=np.int32)
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        # special tokens without characters were added by the tokenizer
        added = spans[:, 0] == spans[:, 1]
        added[added] = np.isin(tokens[added], self._special)
        if not one.complete:
            tokens, spans, added = _without_repeated_prefix(tokens, spans, added)
        return self._finish(one, tokens, trained_tokens(spans, one.answers) & ~added)

    def _finish(self, one: Rendered, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> Tokens:
        """The record with its end trained, if its mask makes sense."""
        if not trained.any():
            raise BadRecord("has no token to train", ": no token of its answer is left by the tokenizer")
        if one.has_prompt and trained.all():
            cause = ': its prompt is empty or within the first token of the answer; {"text"} needs no prompt'
            raise BadRecord("has no token that is not trained", cause)
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"tokenizer {self._name} has no end-of-sequence token: set its eos_token")
        if int(tokens[-1]) in self._ends:
            trained[-1] = True
        else:
            tokens, trained = np.append(tokens, np.int32(eos)), np.append(trained, True)
        return Tokens(tokens, np.where(trained, tokens, np.int32(IGNORED)))


def _half_a_character() -> BadRecord:
    return BadRecord("holds half of a surrogate pair, which is no character")


def trained_tokens(spans: NDArray[np.int64], answers: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens, given the (start, end) characters of each, hold at least one character of an answer."""
    starts, ends = spans[:, 0].copy(), spans[:, 1]
    # Some tokenizers trim white space from offsets, so a token of nothing but white space has no width: it
    # stands for what lies between it and the token before.
    previous = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    empty = starts == ends
    starts[empty] = np.minimum(starts, previous)[empty]
    trained = np.zeros(len(spans), dtype=bool)
    for start, end in answers:
        trained |= (starts < end) & (ends > start)
    return trained


def _without_repeated_prefix(
    tokens: NDArray[np.int32], spans: NDArray[np.int64], added: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Drop what the tokenizer put in front (a BOS) where the text begins with the same tokens."""
    count = int(np.argmin(added)) if not added.all() else 0
    if count and np.array_equal(tokens[:count], tokens[count : 2 * count]):
        return tokens[count:], spans[count:], added[count:]
    return tokens, spans, added


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
