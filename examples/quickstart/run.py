"""The quickstart: from nothing to a trained, evaluated, exported model in a few minutes on two cores.

Data: the docstrings of the Python standard library.  Model: a small LLaMA with random weights.  Training:
all parameters, by `collie train examples/quickstart/train.yaml`, the same command that a real run uses.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = Path("runs/quickstart")
CONFIG = Path(os.path.relpath(HERE / "train.yaml"))
PROMPTS = ("collections.OrderedDict.pop", "os.path.isdir", "email.message.Message.get_all")


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def collie(*arguments: str, capture: bool = False) -> str:
    """Run the `collie` command; its progress goes to the terminal."""
    command = [sys.executable, "-m", "collie_core", *arguments]
    print("$ collie " + shlex.join(arguments), flush=True)
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout or ""


def tokenised(config: Any, split: str) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every record of a split, as training sees them."""
    from collie_core import AutoTokenizer
    from collie_core.data.build import build_dataset

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data = build_dataset(getattr(config.data, split), tokenizer, config.data, split=split)  # type: ignore[arg-type]
    bounds = list(zip(data.offsets[:-1], data.offsets[1:], strict=True))
    return [(data.tokens[a:b].tolist(), data.labels[a:b].tolist()) for a, b in bounds]


def shuffled_context(
    rows: Sequence[tuple[list[int], list[int]]], out: Path, seed: int = 0
) -> tuple[Path, Path]:
    """Two files with the same targets, one a record: after the true context, and after a shuffled one.

    The token right before the target keeps its place, so a bigram model could not tell them apart.
    """
    rng = random.Random(seed)
    paths = out / "context.jsonl", out / "shuffled.jsonl"
    with paths[0].open("w") as true, paths[1].open("w") as shuffled:
        for ids, labels in rows:
            trained = [t for t in range(4, len(ids)) if labels[t] != -100]
            for t in rng.sample(trained, min(3, len(trained))):
                middle = ids[1 : t - 1]
                rng.shuffle(middle)
                target = [-100] * t + [ids[t]]
                true.write(json.dumps({"tokens": ids[: t + 1], "labels": target}) + "\n")
                shuffled.write(
                    json.dumps({"tokens": [ids[0], *middle, ids[t - 1], ids[t]], "labels": target}) + "\n"
                )
    return paths


def perplexity(*arguments: str) -> float:
    """Held-out perplexity by `collie eval`."""
    figures = json.loads(collie("eval", str(CONFIG), *arguments, "--json", capture=True))
    return float(figures["perplexity/perplexity"])


def prove_export(model: Path) -> float:
    """Largest difference between our logits and those of transformers on the exported folder."""
    import torch
    # transformers imports torchao where it is installed, which tells of kernels that a CPU does without
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM as Stock
    from transformers import AutoTokenizer as StockTokenizer
    from transformers.utils.logging import disable_progress_bar

    from collie_core import AutoModelForCausalLM

    disable_progress_bar()
    ids = StockTokenizer.from_pretrained(model)("Question: What does os.path.join do?", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        stock = Stock.from_pretrained(model, dtype=torch.float32)(ids).logits
    return float((ours - stock).abs().max())


def main() -> int:
    """Every stage in order; status 1 where the model did not learn what it should."""
    sys.path.insert(0, str(HERE))
    import baselines
    import docstrings
    import model as small_model

    from collie_core import CollieConfig

    started = time.monotonic()
    if ROOT.exists():
        shutil.rmtree(ROOT)
    say("data: the standard library's docstrings")
    train, held_out = docstrings.write(ROOT / "data")
    print(f"{sum(1 for _ in train.open())} records to train on, {sum(1 for _ in held_out.open())} held out")

    say("model: a small LLaMA with random weights, and a tokenizer trained on the data")
    small_model.write(ROOT / "initial", train)
    config = CollieConfig.from_yaml(CONFIG)
    rows = {split: tokenised(config, split) for split in ("train", "eval")}
    counts = {split: baselines.targets(rows[split]) for split in rows}
    unigram = baselines.unigram_perplexity(counts["train"], counts["eval"], small_model.VOCABULARY)
    bigram, k = baselines.bigram_perplexity(counts["train"], counts["eval"], small_model.VOCABULARY)

    say("held-out perplexity before training")
    before = perplexity()
    say("training all parameters")
    collie("train", str(CONFIG))
    say("held-out perplexity after training, and with shuffled context")
    trained = str(ROOT / "run" / "model")
    after = perplexity("--model", trained)
    true, shuffled = shuffled_context(rows["eval"], ROOT / "data")
    in_context = perplexity("--model", trained, f"data.eval={true}")
    out_of_context = perplexity("--model", trained, f"data.eval={shuffled}")

    say("three answers")
    for name in PROMPTS:
        prompt = f"Question: What does {name} do?\nAnswer:"
        options = ["--max-new-tokens", "40", "--dtype", "float32"]
        print(collie("generate", trained, "--prompt", prompt, *options, capture=True).strip())

    say("the export, read by transformers")
    difference = prove_export(Path(trained))
    print(f"largest difference of a logit: {difference:.1e}")

    say(f"result after {time.monotonic() - started:.0f} s")
    print(f"perplexity on held-out answers: {before:.0f} before, {after:.1f} after training")
    print(f"counting models: add-one unigram {unigram:.0f}, add-{k} bigram {bigram:.1f}")
    print(f"context: {in_context:.1f} with it, {out_of_context:.1f} when it is shuffled")
    learnt = {
        "at most half of the unigram's": after <= unigram / 2,
        "shuffled context at least 20 % worse": out_of_context >= 1.2 * in_context,
        "transformers has equal logits": difference < 1e-4 and math.isfinite(difference),
    }
    for claim, holds in learnt.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return 0 if all(learnt.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
