"""Messages through templates: the answers and their end-of-turn tokens are trained, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collie_core.data.prompts import chat_prompt_tokens, prompt_tokens
from collie_core.data.templates import CHATML, find_template
from collie_core.errors import DataError

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITHOUT_PROMPT = CHATML.replace(GENERATION, "")
# the model's reasoning is told for the last answer only, as Qwen 3 and its like do
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}fine {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATION
)
# asked for an answer, it opens a reasoning that the answers of the records lack
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\nfine {% endif %}")
# the text of fewer messages is never the beginning of the text of more
COUNTING = (
    "{% for m in messages %}{{ messages | length }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + GENERATION
)
NO_MARKS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

SYSTEM = {"role": "system", "content": "fine thanks"}
ROUNDS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "assistant"},
]
HEAD = "<|im_start|>|user|Ċ|hello|<|im_end|>|Ċ|<|im_start|>|assistant|Ċ|"
MIDDLE = "|[<|im_end|>]|Ċ|<|im_start|>|user|Ċ|ho|w|Ġare|Ġyou|<|im_end|>|Ċ|<|im_start|>|assistant|Ċ|"
CHATML_MASK = f"{HEAD}[hello]|[Ġworld]{MIDDLE}[assistant]|[<|im_end|>]|[</s>]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, CHATML_MASK),
        (WITHOUT_PROMPT, CHATML_MASK),
        (OPENED, CHATML_MASK),
        (REASONING, CHATML_MASK.replace("[assistant]|", "[fi]|[ne]|[Ġassistant]|")),
        ("{{ bos_token }}" + CHATML, "<s>|" + CHATML_MASK),
        (
            COUNTING,
            "4|hello|4|[hello]|[Ġworld]|[<|im_end|>]|4|ho|w|Ġare|Ġyou|4|[assistant]|[<|im_end|>]|[</s>]",
        ),
        (
            NO_MARKS,
            "user|:|Ġhello|Ċ|assistant|:|[Ġhello]|[Ġworld]|Ċ|user|:|Ġhow|Ġare|Ġyou|Ċ|assistant|:|[Ġassistant]|[</s>]",
        ),
    ],
    ids=[
        "chatml",
        "no generation prompt",
        "opened",
        "reasoning",
        "its own bos",
        "generation marks",
        "no end of turn",
    ],
)
def test_the_tokenizers_own_template(
    template: str, expected: str, make_bpe: Any, tokenise: Any, marked: Any
) -> None:
    """It is the whole text: the tokenizer adds nothing to it, as in transformers."""
    tokenizer = make_bpe(chat_template=template)
    dataset = tokenise(
        [{"messages": ROUNDS}, {"messages": [*ROUNDS, {"role": "user", "content": "Paris"}]}], tokenizer
    )
    assert marked(dataset, 0, tokenizer) == expected
    # what follows the last answer is left out
    assert marked(dataset, 1, tokenizer).endswith("[</s>]")
    assert "Par" not in marked(dataset, 1, tokenizer)
    whole = tokenizer.apply_chat_template(ROUNDS)["input_ids"]
    size = dataset.lengths[0] - 1
    assert dataset.tokens[:size].tolist() == whole[:size]


def test_a_template_whose_end_of_turn_is_eos_gets_no_second_one(
    make_bpe: Any, tokenise: Any, marked: Any
) -> None:
    tokenizer = make_bpe(chat_template=CHATML, eos_token="<|im_end|>")
    assert marked(tokenise([{"messages": ROUNDS}], tokenizer), 0, tokenizer) == CHATML_MASK.removesuffix(
        "|[</s>]"
    )


def test_named_templates_get_the_tokenizers_bos_once(tokenise: Any, marked: Any, tmp_path: Path) -> None:
    assert marked(tokenise([{"messages": ROUNDS}], template="chatml")) == "<s>|" + CHATML_MASK
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}" + CHATML)
    assert marked(tokenise([{"messages": ROUNDS}], template=str(file))) == "<s>|" + CHATML_MASK
    assert marked(tokenise([{"messages": ROUNDS}], provider_template=CHATML)) == "<s>|" + CHATML_MASK


def test_vicuna(tokenise: Any, marked: Any) -> None:
    expected = (
        "<s>|fi|ne|Ġthanks|ĠUSER|:|Ġhello|ĠASSISTANT|:|[Ġhello]|[Ġworld]|[</s>]"
        "|USER|:|Ġhow|Ġare|Ġyou|ĠASSISTANT|:|[Ġassistant]|[</s>]"
    )
    assert marked(tokenise([{"messages": [SYSTEM, *ROUNDS]}], template="vicuna")) == expected


def test_a_chosen_template_also_renders_prompts(tokenise: Any, marked: Any) -> None:
    expected = f"<s>|{HEAD}[hello]|[Ġworld]|[<|im_end|>]|[</s>]"
    assert marked(tokenise([{"input": "hello", "output": "hello world"}], template="chatml")) == expected
    assert (
        marked(tokenise([{"instruction": "hello", "output": "hello world"}], template="chatml")) == expected
    )
    both = {"instruction": "hello", "input": "hello", "output": "hello world"}
    assert marked(tokenise([both], template="chatml")) == expected.replace(
        "user|Ċ|hello", "user|Ċ|hello|Ċ|Ċ|hello"
    )
    assert marked(tokenise([{"text": "hello"}], template="chatml")) == "<s>|[hello]|[</s>]"


def test_one_of_several_templates_of_the_tokenizer(make_bpe: Any, tokenise: Any, marked: Any) -> None:
    tokenizer = make_bpe(chat_template={"default": CHATML, "marked": COUNTING})
    record = [{"messages": ROUNDS[:2]}]
    assert marked(tokenise(record, tokenizer), 0, tokenizer).startswith(HEAD)
    assert marked(tokenise(record, tokenizer, template="marked"), 0, tokenizer).startswith("2|hello|")


@pytest.mark.parametrize("answer", ["a", "s", "im", "<|im_end|>", " yes", "yes\n"])
def test_answers_that_look_like_the_template(answer: str, make_bpe: Any, tokenise: Any) -> None:
    """The mask follows the places of the texts, not where their words happen to be found."""
    messages = [ROUNDS[0], {"role": "assistant", "content": answer}, *ROUNDS[2:]]
    for template in (CHATML, WITHOUT_PROMPT, REASONING):
        tokenizer = make_bpe(chat_template=template)
        dataset = tokenise([{"messages": messages}], tokenizer)
        thought = "fine " if template is REASONING else ""
        trained = tokenizer.decode(dataset.tokens[dataset.labels != -100])
        assert trained == f"{answer}<|im_end|>{thought}assistant<|im_end|></s>"


def test_an_answer_may_come_first(make_bpe: Any, tokenise: Any, marked: Any) -> None:
    tokenizer = make_bpe(chat_template=CHATML)
    dataset = tokenise([{"messages": [ROUNDS[1]]}], tokenizer)
    assert marked(dataset, 0, tokenizer) == "<|im_start|>|assistant|Ċ|[hello]|[Ġworld]|[<|im_end|>]|[</s>]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is no list of messages"),
        ("hello", "is no list of messages"),
        ([{"content": "hello"}], 'lacks "role" or "content"'),
        ([{"role": "assistant"}], 'lacks "role" or "content"'),
        (["hello"], 'lacks "role" or "content"'),
        ([ROUNDS[0], SYSTEM], 'no message has the role "assistant", .*: it has system, user'),
    ],
)
def test_bad_messages(messages: Any, message: str, tokenise: Any) -> None:
    with pytest.raises(DataError, match=r"train_dataset\[0\]: .*" + message):
        tokenise([{"messages": messages}], template="chatml")
    with pytest.raises(DataError, match="no record of train_dataset can be used"):
        tokenise([{"messages": messages}], template="chatml", on_bad_record="skip")


def test_mistakes_in_templates(make_bpe: Any, tokenise: Any, tmp_path: Path) -> None:
    record = [{"messages": ROUNDS}]

    def refused(message: str, tokenizer: Any = None, **keys: Any) -> None:
        with pytest.raises(DataError, match=message):
            tokenise(record, tokenizer or make_bpe(), **keys)

    refused(
        r"train_dataset\[0\]: records with messages need a chat template, but the tokenizer has none: set"
    )
    refused("template alpaca is for an instruction", template="alpaca")
    refused("'chatm' is no file and no template, did you mean 'chatml'", template="chatm")
    refused("known: alpaca, chatml, vicuna, or the path of a .jinja file", template="nonsense/zzz")
    broken = tmp_path / "broken.jinja"
    broken.write_text("fine\n{% for m in %}")
    refused(r"data.template: .*broken.jinja: line 2: ", template=str(broken))
    broken.write_bytes(b"\xff\xfe")
    refused("broken.jinja: is not UTF-8", template=str(broken))
    refused(
        "chat template refuses the messages: no system",
        make_bpe(chat_template="{{ raise_exception('no system') }}"),
    )
    unmarked = COUNTING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    refused("the tokenizer's chat template cannot be masked", make_bpe(chat_template=unmarked))


def test_templates_run_in_a_sandbox(make_bpe: Any, tokenise: Any, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {target}') }}}}"
    for source in (reach, attack):
        with pytest.raises(DataError, match="refuses the messages"):
            tokenise([{"messages": ROUNDS}], make_bpe(chat_template=source))
    assert not target.exists()


@pytest.mark.parametrize("name", [None, "chatml", "vicuna", "file"])
def test_prompts_of_generation_begin_as_the_records(
    name: str | None, make_bpe: Any, tokenise: Any, tmp_path: Path
) -> None:
    tokenizer = make_bpe(chat_template="{{ bos_token }}" + CHATML)
    if name == "file":  # it writes the token that the tokenizer would add
        (tmp_path / "mine.jinja").write_text("{{ bos_token }}" + CHATML)
        name = str(tmp_path / "mine.jinja")
    template = find_template(name, tokenizer)
    ids = chat_prompt_tokens(ROUNDS[:3], tokenizer, template)
    dataset = tokenise([{"messages": ROUNDS}], tokenizer, template=name)
    assert dataset.tokens[: len(ids)].tolist() == ids and ids[:2].count(tokenizer.bos_token_id) == 1
    answer = dataset.tokens[len(ids) :]
    assert answer.tolist() == dataset.labels[len(ids) :].tolist()
    assert prompt_tokens("hello", tokenizer) == tokenizer("hello")["input_ids"]
