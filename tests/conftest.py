"""Fixtures shared by all tests: a tiny LLaMA folder with a tokenizer, and small data files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# one thread a process: the models are tiny, and threads that wait for busy cores cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# deterministic matrix products on CUDA must be asked for before the first one
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A journey of a thousand miles begins with a single step.",
    "What does the function return? It returns the sum of its arguments.",
    "Numbers such as 1, 2, 3 and 42 stand here, with (brackets) and [more].",
    "How to join paths: use the right separator between the parts.",
    "Yesterday all my troubles seemed so far away.",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], object]:
    """A small byte-level BPE tokenizer that adds <s> in front and has </s> and <pad>."""

    def make() -> object:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES * 20, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            model_max_length=2048,
        )

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[], object]) -> Path:
    """Folder of a random 2-layer LLaMA in Hugging Face layout (fp32), with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    """Forty input/output records of uneven length."""
    return [
        {
            "input": f"Question {n}: {SENTENCES[n % 6][: 10 + n]} ",
            "output": SENTENCES[(n * 5 + 1) % 6][: 12 + 2 * n],
        }
        for n in range(40)
    ]


@pytest.fixture
def data_file(tmp_path: Path, records: list[dict[str, str]]) -> Path:
    """The records as a JSON-lines file."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def make_llama(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[], object]
) -> Callable[..., Path]:
    """Makes folders of random LLaMAs of four layers."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("llama")
            torch.manual_seed(0)
            sizes: dict[str, Any] = {
                "vocab_size": 320,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "tie_word_embeddings": False,
            }
            LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]) -> Path:
    """The records as a JSON-lines file."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def token_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of tokens below 240, of uneven length, with a prompt that is not trained."""
    import torch

    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    generator = torch.Generator().manual_seed(1)
    lines = []
    for number in range(40):
        tokens = torch.randint(4, 240, (9 + number,), generator=generator).tolist()
        lines.append(json.dumps({"tokens": tokens, "labels": [-100] * 4 + tokens[4:]}))
    path.write_text("\n".join(lines) + "\n")
    return path
