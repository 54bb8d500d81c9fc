"""Golden masks of every record form: which tokens are trained, through one tokenisation of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from collie_core.data.tokenize import trained_tokens
from collie_core.errors import DataError

PREAMBLE = "Below is an instruction that describes a task"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "hello world"}, "<s>|[hello]|[Ġworld]|[</s>]"),
        ({"text": "hello world</s>"}, "<s>|[hello]|[Ġworld]|[</s>]"),
        ({"input": "hello", "output": " world"}, "<s>|hello|[Ġworld]|[</s>]"),
        ({"input": "hello ", "output": "world"}, "<s>|hello|[Ġworld]|[</s>]"),
        ({"input": "hello wor", "output": "ld fine"}, "<s>|hello|[Ġworld]|[Ġfine]|[</s>]"),
        ({"input": "hello", "output": " world</s>"}, "<s>|hello|[Ġworld]|[</s>]"),
        ({"input": "hello</s>", "output": " world"}, "<s>|hello|</s>|[Ġworld]|[</s>]"),
        ({"input": "", "output": "hello world"}, "<s>|[hello]|[Ġworld]|[</s>]"),
        ({"input": "hello", "output": "😀 é"}, "<s>|hello|[ð]|[Ł]|[ĺ]|[Ģ]|[Ġ]|[Ã]|[©]|[</s>]"),
        ({"input": "hello 😀", "output": " world"}, "<s>|hello|Ġ|ð|Ł|ĺ|Ģ|[Ġworld]|[</s>]"),
        ({"input": "hello\r\n", "output": "hello\r\n\n"}, "<s>|hello|č|Ċ|[hello]|[č]|[ĊĊ]|[</s>]"),
        ({"input": "hello\n", "output": "\n"}, "<s>|hello|[ĊĊ]|[</s>]"),
        ({"input": "hello", "output": "  "}, "<s>|hello|[Ġ]|[Ġ]|[</s>]"),
        ({"input": "hello", "output": " world", "text": "not this", "id": 7}, "<s>|hello|[Ġworld]|[</s>]"),
        ({"tokens": [5, 6, 7], "labels": [-100, 6, -100]}, None),
        ({"tokens": [5, 6, 7]}, None),
        ({"input_ids": np.array([5, 6, 7]), "labels": np.array([5, 6, 7])}, None),
    ],
)
def test_golden_masks(record: dict[str, Any], expected: str | None, tokenise: Any, marked: Any) -> None:
    dataset = tokenise([record])
    if expected is not None:
        assert marked(dataset) == expected
    else:  # tokens are taken as they are: no BOS, no EOS
        assert dataset.tokens.tolist() == [5, 6, 7]
        assert dataset.labels.tolist() == [-100, *list(record.get("labels", [5, 6, 7]))[1:]]


def test_labels_that_are_not_the_tokens_are_kept(tokenise: Any) -> None:
    dataset = tokenise([{"tokens": [5, 6, 7, 8], "labels": [5, 9, -100, 10]}])
    assert dataset.labels.tolist() == [-100, 9, -100, 10]
    assert dataset.counts.target_tokens == 2


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("adds", ["", "bos", "both"])
def test_special_tokens_and_trimmed_offsets(
    adds: str, trim_offsets: bool, make_bpe: Any, tokenise: Any, marked: Any
) -> None:
    """One EOS, whoever adds it; white space of an answer is trained though some offsets leave it out."""
    tokenizer = make_bpe(adds, trim_offsets=trim_offsets)
    dataset = tokenise([{"input": "hello  ", "output": "world   how  "}], tokenizer)
    front = "" if adds == "" else "<s>|"
    assert marked(dataset, 0, tokenizer) == front + "hello|Ġ|[Ġworld]|[Ġ]|[Ġ]|[Ġhow]|[Ġ]|[Ġ]|[</s>]"


def test_text_without_bos_has_no_target_in_its_first_token(make_bpe: Any, tokenise: Any, marked: Any) -> None:
    tokenizer = make_bpe("")
    dataset = tokenise([{"text": "hello world"}], tokenizer)
    assert marked(dataset, 0, tokenizer) == "hello|[Ġworld]|[</s>]"
    assert dataset.targets.tolist() == [2]


@pytest.mark.parametrize(
    ("record", "context"),
    [
        ({"instruction": "hello", "output": "world"}, ""),
        ({"instruction": "hello", "input": "", "output": "world"}, ""),
        ({"instruction": "hello", "input": None, "output": "world"}, ""),
        ({"instruction": "hello", "input": "fine", "output": "world"}, "### Input:\nfine\n\n"),
    ],
)
def test_alpaca(record: dict[str, Any], context: str, tokenise: Any, bpe: Any) -> None:
    dataset = tokenise([record])
    text = bpe.decode(dataset.tokens)
    paired = ", paired with an input that provides further context" if context else ""
    ask = ". Write a response that appropriately completes the request.\n\n"
    assert text == f"<s>{PREAMBLE}{paired}{ask}### Instruction:\nhello\n\n{context}### Response:\nworld</s>"
    assert bpe.decode(dataset.tokens[dataset.labels != -100]) == "world</s>"
    assert tokenise([{"input": "hello", "output": "world"}], template="alpaca").tokens.tolist() == (
        tokenise([{"instruction": "hello", "output": "world"}]).tokens.tolist()
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": ""}, '"text" is empty'),
        ({"input": "hello", "output": ""}, '"output" is empty'),
        ({"text": 7}, '"text" is no string, it is a int'),
        ({"instruction": ["a"], "output": "b"}, '"instruction" is no string'),
        (
            {"prompt": "a", "ouput": "b"},
            r"of no known form: it has ouput, prompt \('ouput', did you mean 'output'\?\)",
        ),
        ({"text": None}, "it has no keys"),
        ({}, "it has no keys"),
        ("just text", "is no object with fields, it is a str"),
        ({"tokens": []}, "no token to train"),
        ({"tokens": [4]}, "no token to train"),
        ({"tokens": [4, 5], "labels": [4, -100]}, "no token to train"),
        ({"tokens": [4, 5], "labels": [4]}, '"tokens" and "labels" differ in length: 2 and 1'),
        ({"tokens": [4, -5]}, "negative token: -5"),
        ({"tokens": [4, 5], "labels": [4, -1]}, "negative label that is not -100"),
        ({"tokens": [4, 100_000]}, "a token that the tokenizer does not have: "),
        ({"tokens": [4, 2**40]}, "beyond 32 bits"),
        ({"tokens": [4.5, 5.0]}, "no list of integers"),
        ({"tokens": [[4], [5, 6]]}, "no list of integers"),
        ({"input": "\ud800", "output": "b"}, "half of a surrogate pair"),
    ],
)
def test_bad_records_are_named(record: Any, message: str, tokenise: Any) -> None:
    good = {"text": "hello world"}
    with pytest.raises(DataError, match=r"train_dataset\[1\]: .*" + message):
        tokenise([good, record])
    dataset = tokenise([good, record, good], on_bad_record="skip")
    assert len(dataset) == 2
    assert sum(dataset.counts.skipped.values()) == 1
    assert [dataset.origin(number) for number in range(2)] == ["train_dataset[0]", "train_dataset[2]"]


@pytest.mark.parametrize("record", [{"input": "hel", "output": "lo"}, {"input": "", "output": "hello world"}])
def test_a_full_mask_is_refused(record: dict[str, str], make_bpe: Any, tokenise: Any) -> None:
    """Without a BOS these prompts have no token of their own."""
    with pytest.raises(DataError, match=r"train_dataset\[0\]: has no token that is not trained"):
        tokenise([record], make_bpe(""))


def test_an_answer_that_the_tokenizer_drops_is_refused(make_bpe: Any, tokenise: Any) -> None:
    from tokenizers import normalizers

    tokenizer = make_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match=r"train_dataset\[0\]: has no token to train"):
        tokenise([{"input": "hello", "output": "   "}], tokenizer)


def test_a_record_of_unknown_form_names_the_known_ones(tokenise: Any) -> None:
    with pytest.raises(DataError) as found:
        tokenise([{"question": "a", "answer": "b"}])
    for form in ('{"text"}', '{"input", "output"}', '{"messages"}', '{"tokens", "labels"}'):
        assert form in str(found.value)


def test_truncation_drops_records_without_targets(tokenise: Any, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"input": "hello world how are you", "output": " fine"},  # the answer begins at token 6
        {"input": "hello", "output": " world how are you fine"},
        {"input": "hello", "output": " world"},
    ]
    dataset = tokenise(records, max_length=5)
    assert dataset.lengths.tolist() == [5, 4]
    assert dataset.targets.tolist() == [3, 2]
    assert (dataset.counts.dropped, dataset.counts.truncated) == (1, 1)
    assert "no target token within data.max_length 5: 1 (train_dataset[0])" in caplog.text
    assert "records cut at max_length 5: 1 (train_dataset[1])" in caplog.text
    with pytest.raises(
        DataError, match=r"no record of train_dataset can be used: .*max_length 5: 1 \(train_data"
    ):
        tokenise(records[:1], max_length=5)


def test_skipped_records_are_counted_by_reason(tokenise: Any, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"text": "hello"}] + [{"text": ""}] * 5 + [{"input": "a", "output": ""}]
    dataset = tokenise(records, on_bad_record="skip")
    assert dataset.counts.skipped == {'"text" is empty': 5, '"output" is empty': 1}
    assert '"text" is empty: 5 (train_dataset[1], train_dataset[2], train_dataset[3], ...)' in caplog.text


def test_a_tokenizer_without_offsets_is_refused_unless_it_offers_its_own(tokenise: Any) -> None:
    class Words:
        """A slow tokenizer whose model wants a mark between prompt and answer."""

        all_special_ids, eos_token_id, is_fast = [0, 1], 1, False
        name_or_path, chat_template = "./words", None

        def __len__(self) -> int:
            return 1000

    class WordsWithOffsets(Words):
        prompt_suffix = "#"

        def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            spans = [(place, place + 1) for place in range(len(text))]
            return [0, *(ord(letter) for letter in text)], [(0, 0), *spans]

    with pytest.raises(DataError, match=r"tokenizer ./words gives no character offsets"):
        tokenise([{"text": "abc"}], Words())
    dataset = tokenise([{"input": "ab", "output": "c"}, {"text": "ab"}], WordsWithOffsets())
    assert dataset.tokens.tolist() == [0, *map(ord, "ab#c"), 1, 0, *map(ord, "#ab"), 1]
    assert dataset.labels.tolist() == [-100] * 4 + [ord("c"), 1] + [-100] * 2 + [*map(ord, "ab"), 1]


def test_a_tokenizer_without_eos_is_refused(make_bpe: Any, tokenise: Any) -> None:
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenise([{"text": "hello world"}], make_bpe(eos_token=None))


def test_tokens_of_many_records_keep_their_places(tokenise: Callable[..., Any], marked: Any) -> None:
    """More than one batch, forms mixed."""
    kinds: list[dict[str, Any]] = [{"text": "hello"}, {"tokens": [5, 6]}, {"input": "how", "output": " are"}]
    records = [kinds[number % 3] for number in range(1100)]
    dataset = tokenise(records)
    assert len(dataset) == 1100
    assert marked(dataset, 1098) == "<s>|[hello]|[</s>]"
    assert marked(dataset, 1097) == "<s>|ho|w|[Ġare]|[</s>]"
    assert dataset.origin(1097) == "train_dataset[1097]"


def test_trained_tokens_touch_an_answer() -> None:
    spans = np.array([[0, 0], [0, 3], [3, 5], [5, 5], [5, 9], [9, 12]])
    assert trained_tokens(spans, [(4, 6)]).tolist() == [False, False, True, True, True, False]
    assert trained_tokens(spans, [(0, 1), (9, 10)]).tolist() == [False, True, False, False, False, True]
    assert trained_tokens(np.empty((0, 2), dtype=np.int64), [(0, 1)]).tolist() == []


def test_what_is_no_data_set_is_refused(tokenise: Any) -> None:
    with pytest.raises(DataError, match="data.train is not set"):
        tokenise(None)
    with pytest.raises(DataError, match="train_dataset: holds no records"):
        tokenise([])
    with pytest.raises(DataError, match="train_dataset: expected a sequence of records"):
        tokenise(iter([{"text": "hello"}]))
    with pytest.raises(DataError, match="train_dataset: expected a sequence of records"):
        tokenise(SimpleNamespace())
