"""Records of every form with the families' tokenizers: the answer and the token that ends it are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collie_core.data.prompts import chat_prompt_tokens, prompt_tokens
from collie_core.data.templates import find_template
from collie_core.errors import DataError
from collie_models.chatglm import tokenizer as chatglm
from collie_models.internlm import tokenizer as internlm
from collie_models.moss import tokenizer as moss
from collie_models.moss.template import META

CASES = Path(__file__).parents[1] / "golden" / "cases"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "chatglm": chatglm.load_tokenizer,
    "chatglm2": chatglm.load_tokenizer2,
    "internlm": internlm.load_tokenizer,
    "internlm2": internlm.load_tokenizer2,
    "moss": moss.load_tokenizer,
}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "the def"},
    "pair": {"input": "for", "output": " return"},
    "chat": {"messages": [{"role": "user", "content": "for"}, {"role": "assistant", "content": "to"}]},
}


def load(family: str) -> Any:
    return LOADERS[family](CASES / f"tokenizer_{family}")


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant by turns."""
    roles = ("user", "assistant")
    said = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


def show(dataset: Any, tokenizer: Any, record: int = 0) -> str:
    """The names of a record's tokens, lines as ⏎, those that are trained in angular brackets."""
    here = slice(dataset.offsets[record], dataset.offsets[record + 1])
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    shown = []
    for token, label in zip(dataset.tokens[here].tolist(), dataset.labels[here].tolist(), strict=True):
        assert label in (-100, token)
        name = names[token].replace("\n", "⏎").replace("<0x0A>", "⏎")
        shown.append(f"⟨{name}⟩" if label != -100 else name)
    return " ".join(shown)


def trained(dataset: Any, tokenizer: Any, record: int = 0) -> list[str]:
    """What is trained, a text for each run of tokens."""
    here = slice(dataset.offsets[record], dataset.offsets[record + 1])
    runs: list[list[int]] = [[]]
    for token, label in zip(dataset.tokens[here].tolist(), dataset.labels[here].tolist(), strict=True):
        if label != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    return ["".join(names[token] for token in run) for run in runs if run]


EXPECTED = {
    ("chatglm", "text"): "[gMASK] <sop> ⟨▁the⟩ ⟨▁def⟩ ⟨<eop>⟩",
    ("chatglm", "pair"): "▁for [gMASK] <sop> ⟨▁return⟩ ⟨<eop>⟩",
    ("chatglm", "chat"): "▁for [gMASK] <sop> ⟨▁to⟩ ⟨<eop>⟩",
    ("chatglm2", "text"): "[gMASK] sop ⟨▁the⟩ ⟨▁⟩ ⟨def⟩ ⟨</s>⟩",
    ("chatglm2", "pair"): "[gMASK] sop ▁for ⟨▁▁⟩ ⟨return⟩ ⟨</s>⟩",
    (
        "chatglm2",
        "chat",
    ): "[gMASK] sop ▁[ R o un d ▁ 1 ] ⏎ ⏎ 问 ： for ⏎ ⏎ <0xE7> <0xAD> <0x94> ： ⟨▁to⟩ ⟨</s>⟩",
    ("internlm", "text"): "<s> ⟨th⟩ ⟨e⟩ ⟨▁⟩ ⟨def⟩ ⟨</s>⟩",
    ("internlm", "pair"): "<s> for ⟨▁⟩ ⟨return⟩ ⟨</s>⟩",
    ("internlm", "chat"): "<s> <s> < | U ser | > : for <eoh> ⏎ < | <0x42> ot | > : ⟨to⟩ ⟨<eoa>⟩",
    ("internlm2", "text"): "<s> ⟨th⟩ ⟨e⟩ ⟨▁⟩ ⟨def⟩ ⟨</s>⟩",
    ("internlm2", "pair"): "<s> for ⟨▁⟩ ⟨return⟩ ⟨</s>⟩",
    (
        "internlm2",
        "chat",
    ): "<s> <|im_start|> u ser ⏎ for <|im_end|> ⏎ <|im_start|> as si st an t ⏎ ⟨to⟩ ⟨<|im_end|>⟩",
    ("moss", "text"): "t ⟨he⟩ ⟨Ġdef⟩ ⟨<eom>⟩",
    ("moss", "pair"): "for ⟨Ġreturn⟩ ⟨<eom>⟩",
    ("moss", "chat"): "< | H um an | > : Ġfor <eoh> Ċ < | M O S S | > : ⟨Ġto⟩ ⟨<eom>⟩",
}


@pytest.mark.parametrize(("family", "form"), sorted(EXPECTED))
def test_golden_masks(family: str, form: str, tokenise: Any) -> None:
    tokenizer = load(family)
    dataset = tokenise([FORMS[form]], tokenizer, max_length=2048)
    shown = show(dataset, tokenizer)
    if (family, form) == ("moss", "chat"):  # the meta instruction is masked too
        before, _, shown = shown.partition("< | H")
        assert before and "⟨" not in before
        shown = "< | H" + shown
    assert shown == EXPECTED[family, form]


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_a_training_record_goes_on_where_the_prompt_of_generation_ends(family: str, tokenise: Any) -> None:
    tokenizer = load(family)
    messages = turns("for", "to", "if", "else", "return", "the def")
    for said in (messages, messages[:4], messages[:2], turns("for", "to", system="def")):
        dataset = tokenise([{"messages": said}], tokenizer, max_length=2048)
        prompt = chat_prompt_tokens(said[:-1], tokenizer, find_template(None, tokenizer))
        assert dataset.tokens[: len(prompt)].tolist() == prompt
        assert (dataset.labels[len(prompt) :] != -100).all()
        assert dataset.labels[len(prompt) - 1] == -100
    pair = tokenise([FORMS["pair"]], tokenizer)
    prompt = prompt_tokens("for", tokenizer)
    assert pair.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_records_of_two_parts_are_the_originals_pairs(family: str, tokenise: Any) -> None:
    tokenizer = load(family)
    for prompt, answer in [("问：1+1=?", "2"), ("x:\n", "\n    y"), ("a ", " b"), ("[gMASK]", "<sop>x")]:
        dataset = tokenise([{"input": prompt, "output": answer}], tokenizer)
        assert dataset.tokens.tolist() == tokenizer(prompt, answer)["input_ids"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("chatglm", ["▁to<eop>"]),  # earlier answers are part of the prefix, seen from both sides
        ("chatglm2", ["the", "def", "▁to</s>"]),
        ("internlm", ["the<eoa>", "def<eoa>", "to<eoa>"]),
        ("internlm2", ["the<|im_end|>", "def<|im_end|>", "to<|im_end|>"]),
        ("moss", ["Ġthe<eom>", "Ġdef<eom>", "Ġto<eom>"]),
    ],
)
def test_several_rounds(family: str, expected: list[str], tokenise: Any) -> None:
    tokenizer = load(family)
    messages = turns("for", "the", "in", "def", "re", "to", "never", system="if")
    assert trained(tokenise([{"messages": messages}], tokenizer), tokenizer) == expected


@pytest.mark.parametrize("family", sorted(LOADERS))
def test_instructions_go_into_alpacas_prompt(family: str, tokenise: Any) -> None:
    tokenizer = load(family)
    dataset = tokenise([{"instruction": "re", "input": "to", "output": "the"}], tokenizer, max_length=2048)
    assert "".join(trained(dataset, tokenizer)).lstrip("▁") == "the" + tokenizer.eos_token
    assert "### Instruction:\nre\n\n### Input:\nto\n\n### Response:\n" in tokenizer.decode(dataset.tokens)


def test_a_cut_record_of_chatglm_keeps_the_place_of_its_answer(tokenise: Any) -> None:
    """What has no room for a token of its answer is left out, and counted."""
    tokenizer = load("chatglm")
    records = [{"input": "for", "output": "the def return"}, {"input": "for " * 9, "output": "the"}]
    dataset = tokenise(records, tokenizer, max_length=5)
    assert (dataset.counts.records, dataset.counts.truncated, dataset.counts.dropped) == (1, 1, 1)
    assert show(dataset, tokenizer) == "▁for [gMASK] <sop> ⟨▁the⟩ ⟨▁def⟩"


def test_roles_of_chatglm3(tmp_path: Path, tokenise: Any) -> None:
    """They are tokens in what the chat format writes, and text in what a record says without it."""
    folder = tmp_path / "chatglm3-6b"
    folder.mkdir()
    for path in (CASES / "tokenizer_chatglm2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = chatglm.load_tokenizer2(folder)
    messages = turns("for", "the", "re", "to", system="if")
    messages.insert(4, {"role": "tool", "content": "def"})
    dataset = tokenise([{"messages": messages}, {"input": "<|user|>", "output": "to"}], tokenizer)
    assert show(dataset, tokenizer) == (
        "[gMASK] sop <|system|> ▁ ⏎ ▁i f <|user|> ▁ ⏎ ▁for <|assistant|> ⟨▁⟩ ⟨⏎⟩ ⟨▁the⟩ ⟨<|user|>⟩ ▁ ⏎ ▁re "
        "<|observation|> ▁ ⏎ ▁ def <|assistant|> ⟨▁⟩ ⟨⏎⟩ ⟨▁to⟩ ⟨</s>⟩"
    )
    assert show(dataset, tokenizer, 1) == "[gMASK] sop ▁ < | u ser | > ⟨▁to⟩ ⟨</s>⟩"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert dataset.tokens[: len(prompt)].tolist() == prompt
    assert tokenizer.stop_token_ids == [tokenizer.get_command(name) for name in tokenizer.stop_tokens]
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    again = chatglm.load_tokenizer2(tmp_path / "saved")
    assert (
        again.apply_chat_template(messages)["input_ids"]
        == tokenizer.apply_chat_template(messages)["input_ids"]
    )


def test_tools_of_moss(tokenise: Any) -> None:
    """Thoughts, commands and answers are the model's; results are not."""
    tokenizer = load("moss")
    call = {"function": {"name": "Search", "arguments": {"query": "for the"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "in"},
        {"role": "assistant", "content": "", "reasoning_content": "def", "tool_calls": [call]},
        {"role": "tool", "content": 'Search("for the") =>\nre'},
        *[{"role": "assistant", "content": "to"}, {"role": "user", "content": "x"}],
        {"role": "assistant", "content": "the"},
    ]
    dataset = tokenise([{"messages": messages}], tokenizer, template="moss-sft-plugin", max_length=900)
    text = (
        "<|Human|>: in<eoh>\n"
        '⟨<|Inner Thoughts|>: def<eot>\n<|Commands|>: Search("for the")<eoc>⟩\n'
        '<|Results|>:\nSearch("for the") =>\nre\n<eor>\n<|MOSS|>:⟨ to<eom>⟩\n'
        "<|Human|>: x<eoh>\n"
        "⟨<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>⟩\n"
        "<|Results|>:\nNone\n<eor>\n<|MOSS|>:⟨ the<eom>⟩"
    )
    runs = [run.split("⟩")[0] for run in text.split("⟨")[1:]]
    assert trained(dataset, tokenizer) == ["".join(tokenizer.tokenize(run)) for run in runs]
    written = tokenizer.apply_chat_template(
        messages, chat_template=tokenizer.chat_template["moss-sft-plugin"], tokenize=False
    )
    lines = META + "- Web search: disabled.\n- Calculator: disabled.\n- Equation solver: disabled.\n"
    lines += "- Text-to-image: disabled.\n- Image edition: disabled.\n- Text-to-speech: disabled.\n"
    assert written == lines + text.replace("⟨", "").replace("⟩", "")
    assert dataset.tokens.tolist() == tokenizer(written)["input_ids"]


def test_tools_of_moss_are_enabled_by_name(tokenise: Any) -> None:
    tokenizer = load("moss")
    tools = [{"type": "function", "function": {"name": "Calculate", "parameters": {}}}]
    record = {"messages": turns("1+1", "2"), "tools": tools}
    dataset = tokenise([record], tokenizer, template="moss-sft-plugin")
    assert "Calculator: enabled. API: Calculate(expression)\n- Equ" in tokenizer.decode(dataset.tokens)
    with pytest.raises(DataError, match='"tools" is no list, it is a str'):
        tokenise([record | {"tools": "Calculate"}], tokenizer)
    template = tokenizer.chat_template["moss-sft-plugin"]

    def text(said: list[dict[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                said, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=True
            )
        )

    first = text(turns("1+1"))
    assert "- Web search: disabled.\n- Calculator: enabled. API: Calculate(expression)\n" in first
    assert first.endswith("<|Human|>: 1+1<eoh>\n")  # the model opens its thoughts itself
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "Calculate", "arguments": '"1+1"'}}]}
    second = text([*turns("1+1"), call, {"role": "tool", "content": 'Calculate("1+1") => 2'}])
    assert second.removeprefix(first) == (
        '<|Inner Thoughts|>: None<eot>\n<|Commands|>: Calculate("1+1")<eoc>\n'
        '<|Results|>:\nCalculate("1+1") => 2\n<eor>\n<|MOSS|>:'
    )


def test_the_page_names_every_format_and_its_record_works(tokenise: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("## Chat formats of the families")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`([\w.-]+)`", " ".join(rows[1:])))
    known = {name for family in LOADERS for name in load(family).chat_template} | {"chatglm3"}
    assert named == known - {"default"}
    record = json.loads(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0])
    tokenizer = load("moss")
    dataset = tokenise([record], tokenizer, template="moss-sft-plugin")
    thoughts = '<|Inner Thoughts|>: A sum.<eot>\n<|Commands|>: Calculate("1+1")<eoc>'
    answers = [thoughts, " It is 2.<eom>"]
    assert trained(dataset, tokenizer) == ["".join(tokenizer.tokenize(text)) for text in answers]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "internlm", "moss"])
def test_roles_that_a_format_does_not_know_are_refused(family: str, tokenise: Any) -> None:
    messages = [*turns("for"), {"role": "narrator", "content": "in"}, *turns("re", "to")]
    with pytest.raises(DataError, match=r"train_dataset\[0\]: .*narrator"):
        tokenise([{"messages": messages}], load(family))


def test_other_templates_of_a_family_by_name(tokenise: Any) -> None:
    tokenizer = load("internlm")
    dataset = tokenise([FORMS["chat"]], tokenizer, template="internlm-chat-v1.1")
    assert show(dataset, tokenizer) == "<s> < | U ser | > : for ⏎ < | <0x42> ot | > : ⟨to⟩ ⟨<eoa>⟩"
    with pytest.raises(DataError, match="did you mean 'internlm-chat'"):
        tokenise([FORMS["chat"]], tokenizer, template="internlm-chta")
