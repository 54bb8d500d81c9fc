"""From a record of any known form to one text with the character ranges that are trained, or to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collie_core.data.conversations import render_conversation
from collie_core.data.no_tokenizer import NoTokenizer
from collie_core.data.sources import BadRecord
from collie_core.data.templates import Template, alpaca_prompt
from collie_core.errors import nearest

#: label of a token without a loss
IGNORED = -100

FORMS = (
    '{"text"}',
    '{"input", "output"}',
    '{"instruction", "input", "output"}',
    '{"messages"}',
    '{"tokens", "labels"}',
    '{"input_ids", "labels"}',
)
KEYS = ("text", "input", "output", "instruction", "messages", "tokens", "labels", "input_ids")


@dataclass(frozen=True)
class Rendered:
    """One text to tokenise at once.

    answers: ranges (start, end) of its characters whose tokens are trained.
    has_prompt: other tokens must be left, or the mask is wrong.
    complete: the text holds every special token; the tokenizer is to add none in front.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    has_prompt: bool = False
    complete: bool = False


@dataclass(frozen=True)
class Tokens:
    """A record of tokens: ids and labels (IGNORED or the id to predict), int32, of one length."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def render(record: Mapping[str, Any], tokenizer: Any, template: Template) -> Rendered | Tokens:
    """What the record says, in the form that its keys tell; keys of no form are passed over.

    Where keys of several forms are there, the most structured one counts: messages, tokens, instruction,
    input and output, text.  Raises BadRecord, and DataError for a text where there is no tokenizer.
    """
    keys = {key for key, value in record.items() if value is not None}
    if isinstance(tokenizer, NoTokenizer) and not keys & {"tokens", "input_ids"}:
        raise tokenizer.refuse()
    if "messages" in keys and not isinstance(tokenizer, NoTokenizer):
        return _conversation(record["messages"], tokenizer, template, record.get("tools"))
    if keys & {"tokens", "input_ids"}:
        return _tokens(record, "tokens" if "tokens" in keys else "input_ids", len(tokenizer))
    if {"instruction", "output"} <= keys:
        context = _string(record, "input") if "input" in keys else ""
        return _instruction(_string(record, "instruction"), context, _answer(record), tokenizer, template)
    if {"input", "output"} <= keys:
        return _input_output(_string(record, "input"), _answer(record), tokenizer, template)
    if "text" in keys:
        start = prompt_suffix(tokenizer)
        text = _string(record, "text")
        if not text:
            raise BadRecord('"text" is empty')
        return Rendered(start + text, ((len(start), len(start + text)),))
    raise _unknown_form(sorted(map(str, keys)))


def _unknown_form(keys: list[str]) -> BadRecord:
    hints = [f" ({key!r}{near})" for key in keys if key not in KEYS and (near := nearest(key, KEYS))]
    has = (", ".join(keys) or "no keys") + "".join(hints[:1])
    return BadRecord("is of no known form", f": it has {has}; known are {', '.join(FORMS)}")


def prompt_suffix(tokenizer: Any) -> str:
    """What the tokenizer's model needs between a prompt and its answer, such as `[gMASK]<sop>`; mostly ""."""
    return getattr(tokenizer, "prompt_suffix", "")


def _input_output(prompt: str, answer: str, tokenizer: Any, template: Template) -> Rendered:
    if template.is_alpaca:
        prompt = alpaca_prompt(prompt, "")
    elif template.chosen:
        return _conversation(_turn(prompt, answer), tokenizer, template)
    return _prompt_answer(prompt, answer, tokenizer)


def _instruction(instruction: str, context: str, answer: str, tokenizer: Any, template: Template) -> Rendered:
    if template.chosen and not template.is_alpaca:
        content = f"{instruction}\n\n{context}" if context else instruction
        return _conversation(_turn(content, answer), tokenizer, template)
    return _prompt_answer(alpaca_prompt(instruction, context), answer, tokenizer)


def _prompt_answer(prompt: str, answer: str, tokenizer: Any) -> Rendered:
    prompt += prompt_suffix(tokenizer)
    text = prompt + answer
    return Rendered(text, ((len(prompt), len(text)),), has_prompt=True)


def _turn(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _conversation(messages: Any, tokenizer: Any, template: Template, tools: Any = None) -> Rendered:
    text, answers = render_conversation(messages, tokenizer, template, tools)
    return Rendered(text, answers, has_prompt=True, complete=template.own)


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" is no string', f", it is a {type(value).__name__}")
    return value


def _answer(record: Mapping[str, Any]) -> str:
    answer = _string(record, "output")
    if not answer:
        raise BadRecord('"output" is empty')
    return answer


def _tokens(record: Mapping[str, Any], key: str, vocabulary: int) -> Tokens:
    """The ids and labels as they are; without labels every token is trained."""
    ids = _integers(record[key], key)
    labels = ids if record.get("labels") is None else _integers(record["labels"], "labels")
    if len(labels) != len(ids):
        raise BadRecord(f'"{key}" and "labels" differ in length', f": {len(ids)} and {len(labels)}")
    if len(ids) and ids.min() < 0:
        raise BadRecord(f'"{key}" holds a negative token', f": {ids.min()}")
    if ((labels < 0) & (labels != IGNORED)).any():
        raise BadRecord(f'"labels" holds a negative label that is not {IGNORED}')
    largest = int(max(ids.max(initial=0), labels.max(initial=0)))
    if largest >= vocabulary:
        raise BadRecord("holds a token that the tokenizer does not have", f": {largest}; it has {vocabulary}")
    return Tokens(ids, labels)


def _integers(value: Any, key: str) -> NDArray[np.int32]:
    try:
        found = np.asarray(value)
    except ValueError:  # ragged
        found = np.empty((0, 0))
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or found.size == 0):
        raise BadRecord(f'"{key}" is no list of integers')
    if found.size and np.abs(found).max() > np.iinfo(np.int32).max:
        raise BadRecord(f'"{key}" holds a number beyond 32 bits')
    return found.astype(np.int32)
