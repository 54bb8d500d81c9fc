"""Evaluators: figures over the evaluation data, each record counted once, each token alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.data.batch import MicroBatch
    from collie_core.hookspecs import Layout

Evaluator = Callable[["Layout"], dict[str, float]]
Batches = Iterable["MicroBatch"]


def perplexity(batches: Batches) -> Evaluator:
    """exp of the mean loss over all target tokens: independent of batch size and padding."""

    def evaluate(layout: Layout) -> dict[str, float]:
        loss, tokens = layout.evaluate(batches)
        mean = loss / max(1, tokens)
        return {"perplexity": math.exp(min(mean, 700.0)), "loss": mean, "tokens": tokens}

    return evaluate


EVALUATORS: dict[str, Callable[[Batches], Evaluator]] = {"perplexity": perplexity}


def make_evaluators(config: CollieConfig, batches: Batches) -> dict[str, Evaluator]:
    """The config's evaluators by name."""
    return {section.name: EVALUATORS[section.name](batches) for section in config.evaluate.evaluators}


def run_evaluators(evaluators: Mapping[str, Evaluator], layout: Layout) -> dict[str, float]:
    """Every figure of every evaluator, under `<evaluator>/<figure>`."""
    return {
        f"{name}/{figure}": value
        for name, evaluator in evaluators.items()
        for figure, value in evaluator(layout).items()
    }
