"""Generation: greedy equals transformers, sampling follows its processors, rows stop where they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer as StockTokenizer
from transformers import LlamaForCausalLM as StockLlama
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from collie_core import AutoModelForCausalLM
from collie_core.errors import UserError
from collie_core.models.causal_lm import CausalLM
from collie_core.models.generation import generate


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights, so that its choices are clear."""
    target = tmp_path_factory.mktemp("generation")
    stock = StockLlama.from_pretrained(tiny_llama)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    stock.save_pretrained(target)
    StockTokenizer.from_pretrained(tiny_llama).save_pretrained(target)
    return target


@pytest.fixture
def model(folder: Path) -> CausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def stock(folder: Path) -> StockLlama:
    return StockLlama.from_pretrained(folder).eval()


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts padded on the left, and their mask."""
    ids = torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :7] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(model: CausalLM, stock: StockLlama, penalty: float) -> None:
    ids, mask = prompts()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": penalty}
    expected = stock.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    found = model.generate(ids, mask, pad_token_id=0, **options)
    assert torch.equal(found[:, : expected.shape[1]], expected)
    for row in range(3):  # and each prompt alone gives the same
        alone = ids[row : row + 1, mask[row].bool()]
        single = model.generate(alone, pad_token_id=0, **options)[0, alone.shape[1] :]
        assert torch.equal(found[row, 9 : 9 + len(single)], single)


def test_every_cached_step_is_the_argmax_of_a_whole_pass(model: CausalLM) -> None:
    ids, mask = prompts()
    row = model.generate(ids[:1], max_new_tokens=12, eos_token_id=-1)
    assert row.shape == (1, 21)
    logits = model(row).logits
    assert torch.equal(logits[0, 8:-1].argmax(-1), row[0, 9:])


def test_rows_stop_by_themselves(model: CausalLM) -> None:
    ids, mask = prompts()
    free = model.generate(ids, mask, max_new_tokens=12, eos_token_id=-1)
    new = free[:, 9:]
    first, second = int(new[0, 3]), int(new[1, 5])
    stopped = model.generate(ids, mask, max_new_tokens=12, eos_token_id=[first, second], pad_token_id=7)
    longest = 0
    for row in range(3):
        ends = [i for i, token in enumerate(new[row].tolist()) if token in (first, second)]
        length = (ends[0] + 1) if ends else 12
        longest = max(longest, length)
        assert torch.equal(stopped[row, 9 : 9 + length], new[row, :length])
        assert bool((stopped[row, 9 + length :] == 7).all())
    assert stopped.shape[1] == 9 + longest  # it ends with the last row
    single = model.generate(ids[:1], max_new_tokens=12, eos_token_id=first)
    assert single.shape[1] == 9 + 4 and int(single[0, -1]) == first


def test_defaults_come_from_the_folder(model: CausalLM, folder: Path, tmp_path: Path) -> None:
    ids, _ = prompts()
    free = model.generate(ids[:1], max_new_tokens=8, eos_token_id=-1)[0, 9:].tolist()
    for file, key in (("generation_config.json", [free[2], 319]), ("config.json", free[4])):
        target = tmp_path / file
        target.mkdir()
        for path in folder.iterdir():
            if path.name != "generation_config.json":
                (target / path.name).write_bytes(path.read_bytes())
        content = json.loads((target / file).read_text()) if file == "config.json" else {}
        (target / file).write_text(json.dumps(content | {"eos_token_id": key, "pad_token_id": 9}))
        found = AutoModelForCausalLM.from_pretrained(target).generate(
            torch.cat([ids[:1], ids[:1].flip(1)]), max_new_tokens=8
        )
        end = free.index(key if isinstance(key, int) else key[0])
        assert found[0, 9 : 9 + end + 1].tolist() == free[: end + 1]
        assert set(found[0, 9 + end + 1 :].tolist()) <= {9}


def test_sampling_is_a_function_of_its_seed(model: CausalLM) -> None:
    ids, mask = prompts()

    def draw(seed: int | None, **options: Any) -> Tensor:
        return model.generate(
            ids, mask, max_new_tokens=10, do_sample=True, eos_token_id=-1, seed=seed, **options
        )

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(3)
    first = draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first)
    greedy = model.generate(ids, mask, max_new_tokens=10, eos_token_id=-1)
    assert torch.equal(draw(1, top_k=1), greedy) and torch.equal(draw(1, top_p=1e-6), greedy)
    assert torch.equal(draw(1, temperature=1e-4), greedy)


OPTIONS: list[dict[str, float]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_draws_follow_the_distribution_of_transformers(model: CausalLM, options: dict[str, Any]) -> None:
    prompt = prompts()[0][:1]
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    logits = model(prompt).logits[:, -1].detach()
    expected = processors(prompt, logits).softmax(-1)[0]  # type: ignore[arg-type]
    draws = 4000
    found = model.generate(
        prompt.expand(draws, -1), max_new_tokens=1, do_sample=True, eos_token_id=-1, seed=0, **options
    )[:, -1]
    counts = torch.bincount(found, minlength=320) / draws
    assert float(counts[expected == 0].sum()) == 0.0
    spread = (expected * (1 - expected) / draws).sqrt()
    assert bool(((counts - expected).abs() <= 5 * spread + 1e-6).all())


def test_stop_strings_end_a_row(model: CausalLM, folder: Path) -> None:
    tokenizer: Any = StockTokenizer.from_pretrained(folder)
    ids, _ = prompts()
    free = model.generate(ids[:1], max_new_tokens=20, eos_token_id=-1)[0, 9:]
    stop: str = tokenizer.decode(free[4:7])
    before = next(n for n in range(1, 21) if stop in tokenizer.decode(free[:n]))
    found = model.generate(
        ids[:1],
        max_new_tokens=20,
        eos_token_id=-1,
        stop_strings=["never to be found", stop],
        tokenizer=tokenizer,
    )
    assert found[0, 9:].tolist() == free[:before].tolist()
    prompt_text: str = tokenizer.decode(ids[0, 3:6])  # a stop string in the prompt stops nothing
    if prompt_text not in tokenizer.decode(free):
        again = model.generate(
            ids[:1], max_new_tokens=20, eos_token_id=-1, stop_strings=[prompt_text], tokenizer=tokenizer
        )
        assert again.shape[1] == 29


def test_streaming(model: CausalLM) -> None:
    ids, mask = prompts()
    steps: list[Tensor] = []
    found = model.generate(ids, mask, max_new_tokens=5, eos_token_id=-1, streamer=steps.append)
    assert torch.equal(torch.stack(steps, 1), found[:, 9:])


def test_leaves_the_model_as_it_was(model: CausalLM) -> None:
    ids, _ = prompts()
    model.train()
    out = generate(model, ids, max_new_tokens=2)
    assert model.training and not out.requires_grad and out.dtype == torch.int64
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0, expected above 0"),
        ({"top_k": -3}, "top_k=-3, expected 0"),
        ({"top_p": 0.0}, "top_p=0.0, expected above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad the prompts on the left"),
    ],
)
def test_options_that_make_no_sense(model: CausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(torch.tensor([[5, 6, 7]]), **options)
