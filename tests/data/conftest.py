"""A small byte-level BPE tokenizer trained here, and data sets made with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from collie_core.config.schema import DataSection
from collie_core.data.build import build_dataset
from collie_core.data.dataset import TokenizedDataset

CORPUS = [
    "hello world how are you fine thanks what is the capital of France Paris",
    " hello world how are you fine thanks what is the capital of France Paris",
    "user assistant system USER: ASSISTANT: Question: Answer: yes no",
    "system\nuser\nassistant\n\n\n",
]


def train_tokenizer() -> Tokenizer:
    """Whole words of the corpus are single tokens; other text falls apart into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


MakeBpe = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_bpe() -> MakeBpe:
    """tokenizer(adds="bos"|"both"|"", trim_offsets=..., **special tokens and chat_template)."""
    trained = train_tokenizer().to_str()

    def make(adds: str = "bos", trim_offsets: bool = False, **options: Any) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(trained)
        single = {"": "$A", "bos": "<s> $A", "both": "<s> $A </s>"}[adds]
        ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=ends))
        backend.post_processor = processors.Sequence(steps)
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **names
        )

    return make


@pytest.fixture(scope="session")
def bpe(make_bpe: MakeBpe) -> PreTrainedTokenizerFast:
    return make_bpe()


@pytest.fixture(scope="session")
def tokenise(bpe: Any) -> Callable[..., TokenizedDataset]:
    """The data set of some records, with keys of the config's data section."""

    def make(
        records: Sequence[Mapping[str, Any]],
        tokenizer: Any = bpe,
        provider_template: str | None = None,
        **keys: Any,
    ) -> TokenizedDataset:
        return build_dataset(
            records, tokenizer, DataSection(**keys), split="train", provider_template=provider_template
        )

    return make


@pytest.fixture(scope="session")
def marked(bpe: Any) -> Callable[..., str]:
    """Tokens of a record split by `|`, the trained ones in brackets."""

    def show(dataset: TokenizedDataset, record: int = 0, tokenizer: Any = bpe) -> str:
        here = slice(dataset.offsets[record], dataset.offsets[record + 1])
        names = tokenizer.convert_ids_to_tokens(dataset.tokens[here].tolist())
        for token, label in zip(dataset.tokens[here], dataset.labels[here], strict=True):
            assert label in (-100, token)
        return "|".join(
            f"[{name}]" if label != -100 else name
            for name, label in zip(names, dataset.labels[here], strict=True)
        )

    return show


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, records: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
