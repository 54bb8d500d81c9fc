"""Templates by name, by file, or the tokenizer's own: how fields and messages become one text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collie_core.errors import DataError, nearest

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The conversation format of Vicuna 1.1 (https://github.com/lm-sys/FastChat, conversation.py).
VICUNA = (
    "{% if messages[0].role != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }} "
    "{% elif message.role == 'user' %}USER: {{ message.content }} "
    "{% else %}ASSISTANT: {{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

CHATS = {"chatml": CHATML, "vicuna": VICUNA}
NAMES = ("alpaca", *CHATS)


@dataclass(frozen=True)
class Template:
    """What `data.template` stands for.

    name is for messages.  chat is the Jinja source for conversations, None where there is none.
    chosen: the config names it, so it also renders records with input and output or an instruction.
    own: it is the tokenizer's, whose chat template writes every special token itself.
    """

    name: str
    chat: str | None
    chosen: bool = False
    own: bool = False

    @property
    def is_alpaca(self) -> bool:
        """Fields go into alpaca's prompt rather than into a conversation."""
        return self.chosen and self.chat is None


def find_template(given: str | None, tokenizer: Any, provider_template: str | None = None) -> Template:
    """The template of a run: the one `given`, else the tokenizer's own, else the model family's.

    given: a built-in name, a name among the tokenizer's templates, or the path of a `.jinja` file.
    Raises DataError for anything else.
    """
    own = getattr(tokenizer, "chat_template", None)
    several = own if isinstance(own, dict) else {}
    if given is None:
        own = several.get("default") if several else own
        if own is not None:
            return Template("the tokenizer's chat template", own, own=True)
        return Template("the model family's template", provider_template)
    if given == "alpaca":
        return Template(given, None, chosen=True)
    if given in CHATS:
        return Template(given, CHATS[given], chosen=True)
    if given in several:
        return Template(given, several[given], chosen=True, own=True)
    path = Path(given).expanduser()
    known = [*NAMES, *several]
    if not path.is_file():
        raise DataError(
            f"data.template: {given!r} is no file and no template{nearest(given, known)}; "
            f"known: {', '.join(known)}, or the path of a .jinja file"
        )
    try:
        return Template(given, path.read_text(encoding="utf-8"), chosen=True)
    except UnicodeDecodeError:
        raise DataError(f"data.template: {given}: is not UTF-8 text") from None


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023); `context` is the record's `input`, or ""."""
    preamble = "Below is an instruction that describes a task"
    if context:
        preamble += ", paired with an input that provides further context"
        context = f"### Input:\n{context}\n\n"
    return (
        f"{preamble}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    )
