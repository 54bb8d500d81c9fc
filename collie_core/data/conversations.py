"""Messages through a chat template, and which characters of the text the assistant says.

The template's own `{% generation %}` marks say it.  Without them, the answer to messages[:i] is what the
template's text for messages[:i + 1] has beyond its text for messages[:i] with the generation prompt, so the
end-of-turn token is part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from collie_core.data.sources import BadRecord
from collie_core.data.templates import Template
from collie_core.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

Ranges = tuple[tuple[int, int], ...]

MARK = "\ufdd0answer\ufdd0"  # stands for an answer; noncharacters, so no text holds it


@dataclass(frozen=True)
class _Chat:
    """What turns messages into a text."""

    tokenizer: Any
    template: Template
    tools: list[Any] | None

    def text(self, messages: Any, prompt: bool = False) -> str:
        """The template's text; `prompt` asks for the words that open an answer."""
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template.chat,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"data.template: {self.template.name}: line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:  # a template is a program of its own and may fail in any way
            raise BadRecord(f"{self.template.name} refuses the messages", f": {error}") from None
        assert isinstance(text, str)
        return text


def render_conversation(
    messages: Any, tokenizer: Any, template: Template, tools: Any = None
) -> tuple[str, Ranges]:
    """The text up to the end of the last answer, and the ranges of the answers in it.

    tools: JSON schemas of functions, for templates that tell the model of them.
    What follows the last answer teaches nothing and is left out.
    Raises BadRecord, and DataError where no chat template is at hand.
    """
    _check(messages)
    if template.chat is None:
        raise DataError(
            f"records with messages need a chat template, but {_lacking(template)}: "
            "set data.template to chatml, vicuna or the path of a .jinja file"
        )
    if tools is not None and not isinstance(tools, list | tuple):
        raise BadRecord('"tools" is no list', f", it is a {type(tools).__name__}")
    chat = _Chat(tokenizer, template, list(tools) if tools else None)
    text = chat.text(messages)
    answers = _answers_by_generation_marks(text, messages, chat)
    answers = answers or _answers_by_prefixes(text, messages, chat)
    if answers is None:
        raise BadRecord(
            f"{template.name} cannot be masked",
            ": its text of the first messages is not the beginning of its text of all, so answers cannot be "
            "told from prompts; mark them by {% generation %} in a .jinja file, or set data.template to "
            "chatml",
        )
    return text[: answers[-1][1]], answers


def _lacking(template: Template) -> str:
    return f"template {template.name} is for an instruction" if template.chosen else "the tokenizer has none"


def _check(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRecord('"messages" is no list of messages, or empty')
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not ("content" in message or "tool_calls" in message)
        ):
            raise BadRecord('a message lacks "role" or "content"', f": {str(message)[:80]}")
    roles = [message["role"] for message in messages]
    for role in sorted(set(roles) - set(ROLES)):  # others are a template's own; a misspelt one loses its loss
        near = get_close_matches(role.lower(), ROLES, 1, 0.85)
        if near:
            raise BadRecord(f"a message has the role {role!r}, did you mean {near[0]!r}?")
    if "assistant" not in roles:
        has = ", ".join(sorted(set(roles)))
        raise BadRecord('no message has the role "assistant", so nothing would be trained', f": it has {has}")


def _answers_by_prefixes(text: str, messages: Any, chat: _Chat) -> Ranges | None:
    """Ranges of the answers, or None where the text of fewer messages is no prefix of the whole."""
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        start = _start(text, before, chat)
        if start is None:
            return None
        upto = text if index == len(messages) - 1 else chat.text(messages[: index + 1])
        content = message.get("content") or ""
        if text.startswith(upto):
            end: int | None = _end(upto, content)
        else:
            end = _old_turn_end(text, start, before, content, chat)
        if end is None or end <= start:
            return None
        answers.append((start, end))
    return tuple(answers)


def _start(text: str, before: Any, chat: _Chat) -> int | None:
    """Where the answer to `before` starts, if the text begins with the template's text for `before`."""
    if before:
        prompt = chat.text(before, prompt=True)
        if text.startswith(prompt) and prompt != chat.text(before):
            return len(prompt)
    # No generation prompt, or one that opens a reasoning which this answer lacks: what the template puts
    # before the answer, such as "assistant:", is not for the model to say.
    header = _around_answer(before, chat)[0]
    return len(header) if text.startswith(header) else None


def _end(upto: str, content: Any) -> int:
    """Where the last answer of `upto` ends: with its end-of-turn token, without the white space after it."""
    found = upto.rfind(content) if isinstance(content, str) else -1
    return max(len(upto.rstrip()), found + len(content) if found >= 0 else 0)


def _old_turn_end(text: str, start: int, before: Any, content: Any, chat: _Chat) -> int | None:
    """The end of an answer that the template tells otherwise now than when it was the last one.

    Some leave out the reasoning of old turns; then the answer's own words and the end-of-turn token must
    still follow the start.
    """
    if not isinstance(content, str) or not content.strip():
        return None
    end_of_turn = _around_answer(before, chat)[1].rstrip()
    for words in (content, content.strip()):
        found = text.find(words + end_of_turn, start)
        if found >= 0 and not text[start:found].strip():
            return found + len(words + end_of_turn)
    return None


def _around_answer(before: Any, chat: _Chat) -> tuple[str, str]:
    """What the template puts before and after the words of an answer to `before`."""
    marked = chat.text([*before, {"role": "assistant", "content": MARK}])
    header, _, ending = marked.partition(MARK)
    return header, ending


def _answers_by_generation_marks(text: str, messages: Any, chat: _Chat) -> Ranges | None:
    """Ranges that the template marks by `{% generation %}`, each with the end-of-turn token after it."""
    source = chat.template.chat or ""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=source,
        tools=chat.tools,
        return_assistant_tokens_mask=True,
        **chat.tokenizer.special_tokens_map,
    )
    (whole,), (marked,) = rendered
    if whole != text or not marked:
        return None
    ending = [*chat.tokenizer.all_special_tokens, *getattr(chat.tokenizer, "stop_tokens", ())]
    end_of_turn = re.compile("|".join(re.escape(token) for token in ending) or "(?!)")
    return tuple(
        (start, after.end() if (after := end_of_turn.match(text, end)) else end) for start, end in marked
    )
