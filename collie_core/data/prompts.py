"""Prompts of generation as the records of training begin."""

from __future__ import annotations

from typing import Any

from collie_core.data.records import prompt_suffix
from collie_core.data.templates import Template


def prompt_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """The ids of a text to go on from, with what the tokenizer's model needs before an answer."""
    return list(tokenizer(prompt + prompt_suffix(tokenizer))["input_ids"])


def chat_prompt_tokens(messages: list[dict[str, Any]], tokenizer: Any, template: Template) -> list[int]:
    """The ids of messages up to where the answer starts.

    The tokenizer's own template is tokenised by it; with any other the tokenizer adds in front what it adds
    to every text, unless the template has written it already.
    """
    options = {"chat_template": template.chat, "add_generation_prompt": True}
    if template.own:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    ids = prompt_tokens(tokenizer.apply_chat_template(messages, tokenize=False, **options), tokenizer)
    repeated = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if repeated else ids
