"""The task of `benchmarks/quality.py`: statements to learn from, questions to be tuned on, a small LLaMA.

A question that is held out, by its operands, is in neither of the other two.  Everything is a function of the
size and the seed.  Run by itself it prints some of each.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from collie_core import AutoModelForCausalLM

WORDS = (
    "ash bay cat dog elm fox gem hat ice jar kit log map nut oak pen rod sun tea urn van web yak zoo".split()
)
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}User : {{ message.content }} Assistant :"
    "{% else %}{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
HELD_OUT = 8  # one question in so many
EPOCHS = 8  # of pre-training; tuning sees each record once


@dataclass(frozen=True)
class Size:
    """Model, data and steps.  numbers: operands are below it.  Lengths in tokens, batches in rows."""

    hidden: int
    inner: int
    layers: int
    heads: int
    numbers: int
    length: int  # of a document to pre-train on, each of which is seen EPOCHS times
    pretraining_steps: int
    pretraining_batch: int
    pretraining_lr: float
    batch: int
    steps: int
    questions: int  # held out

    @property
    def rate(self) -> float:
        """What default rates, which are for models about 4,096 wide, are multiplied with.

        LLaMA's best rates fall with the width to the power of 0.78, with LoRA and without (Schulman and
        Thinking Machines 2025, "LoRA Without Regret", and their cookbook).
        """
        return (4096 / self.hidden) ** 0.78

    @property
    def documents(self) -> int:
        """To pre-train on."""
        return -(-self.pretraining_steps * self.pretraining_batch // EPOCHS)


SIZES = {
    "tiny": Size(128, 384, 3, 4, 20, 64, 800, 32, 2e-3, 16, 300, 400),
    "small": Size(1024, 2752, 6, 16, 100, 128, 1600, 128, 6e-4, 64, 200, 1200),
}


@dataclass(frozen=True)
class Question:
    """Ways to say the same in a plain text, ways to ask for it, and the answer.

    Where there are statements, plain texts have the first way of asking, too.
    """

    statements: Sequence[str]
    prompts: Sequence[str]
    answer: str

    def plain(self, rng: random.Random) -> str:
        """What a plain text says of it."""
        asked = f"{self.prompts[0]} {rng.choice(('', 'The answer is ', 'A : '))}{self.answer} ."
        return rng.choice([*self.statements, asked, asked])


def _sum(numbers: int, rng: random.Random) -> Question:
    a, b = rng.randrange(numbers), rng.randrange(numbers)
    statements = (f"{a} + {b} = {a + b} .", f"{a} plus {b} is {a + b} .")
    return Question(statements, (f"What is {a} plus {b} ?", f"Add {a} and {b} ."), f"{a + b}")


def _larger(numbers: int, rng: random.Random) -> Question:
    a, b = rng.sample(range(numbers), 2)
    statements = (f"the larger of {a} and {b} is {max(a, b)} .", f"{min(a, b)} < {max(a, b)} .")
    prompts = (f"Which is larger , {a} or {b} ?", f"Name the larger one of {a} and {b} .")
    return Question(statements, prompts, f"{max(a, b)}")


def _count(numbers: int, rng: random.Random) -> Question:
    a = rng.randrange(5 * numbers)
    following = f"{a + 1} , {a + 2} , {a + 3}"
    return Question((f"{a} , {following} .",), (f"Count on from {a} .", f"What comes after {a} ?"), following)


def _reversal(_: int, rng: random.Random) -> Question:
    words = rng.sample(WORDS, 3)
    there, back = " ".join(words), " ".join(reversed(words))
    prompts = (f"Reverse {there} .", f"What is {there} read backwards ?")
    return Question((f"{there} | {back} .", f"{there} backwards is {back} ."), prompts, back)


def _last(_: int, rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(2, 4))
    there = " ".join(words)
    prompts = (f"Which word is the last one of {there} ?", f"Say the last of {there} .")
    return Question((), prompts, words[-1])  # no statement: this is to be learnt in the tuning


KINDS: dict[str, Callable[[int, random.Random], Question]] = {
    "sum": _sum,
    "larger": _larger,
    "count": _count,
    "reversal": _reversal,
    "last": _last,
}


def _draw(kind: str, numbers: int, rng: random.Random, held_out: bool) -> Question:
    while True:
        question = KINDS[kind](numbers, rng)
        key = " ".join([kind, *sorted(question.prompts[0].split())])  # 3 and 5 is 5 and 3
        if (zlib.crc32(key.encode()) % HELD_OUT == 0) == held_out:
            return question


def documents(size: Size, seed: int) -> Iterator[dict[str, str]]:
    """Records to pre-train on: statements of all kinds, one after the other."""
    rng = random.Random(seed)
    stated = [kind for kind in KINDS if KINDS[kind](10, rng).statements]
    for _ in range(size.documents):
        drawn = (_draw(rng.choice(stated), size.numbers, rng, False) for _ in range(size.length // 7))
        yield {"text": " ".join(question.plain(rng) for question in drawn)}


def chat(question: Question, rng: random.Random) -> dict[str, Any]:
    """A record to tune on."""
    user = {"role": "user", "content": rng.choice(question.prompts)}
    return {"messages": [user, {"role": "assistant", "content": question.answer}]}


def tuning(size: Size, seed: int) -> list[dict[str, Any]]:
    """As many records as are tuned on, of all kinds in turn."""
    rng, kinds = random.Random(seed), list(KINDS)
    return [
        chat(_draw(kinds[i % len(kinds)], size.numbers, rng, False), rng)
        for i in range(size.steps * size.batch)
    ]


def held_out(size: Size, seed: int) -> list[dict[str, Any]]:
    """Records that are in no training, each once, with their `kind`, and asked the way of `plain` texts."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        for _ in range(size.questions // len(KINDS)):
            question = _draw(kind, size.numbers, rng, True)
            record = {"kind": kind, "plain": f"{question.prompts[0]} A :", **chat(question, rng)}
            found.setdefault(record["messages"][0]["content"], record)
    return list(found.values())


def make_tokenizer(size: Size, seed: int) -> PreTrainedTokenizerFast:
    """A token for each word, digit and sign that occurs."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    rng, texts = random.Random(seed), ["User : Assistant : A : The answer is"]
    for _ in range(200):
        for kind in KINDS.values():
            question = kind(size.numbers, rng)
            texts += [*question.statements, *question.prompts, question.answer]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def write_model(folder: Path, size: Size, seed: int) -> None:
    """Config, random weights and tokenizer."""
    tokenizer = make_tokenizer(size, seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    AutoModelForCausalLM.from_config(config, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    for size in SIZES.values():
        print(next(documents(size, 0))["text"])
        for record in [*tuning(size, 1)[: len(KINDS)], *held_out(size, 2)[:3]]:
            print(" -> ".join(message["content"] for message in record["messages"]))
