"""What counting alone reaches: smoothed unigram and bigram models of the answers' tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Target = tuple[int, int]  # (token before, token to predict)


def targets(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Target]:
    """(previous token, target token) of every trained token; rows are (input_ids, labels), -100 untrained."""
    return [(ids[t - 1], labels[t]) for ids, labels in rows for t in range(1, len(ids)) if labels[t] != -100]


def unigram_perplexity(train: Sequence[Target], held_out: Sequence[Target], vocabulary: int) -> float:
    """Add-one unigram model."""
    counts = Counter(token for _, token in train)
    total = len(train) + vocabulary
    return math.exp(-sum(math.log((counts[token] + 1) / total) for _, token in held_out) / len(held_out))


def bigram_perplexity(
    train: Sequence[Target], held_out: Sequence[Target], vocabulary: int
) -> tuple[float, float]:
    """Add-k bigram model with the best k of a few, chosen on the held-out data; (perplexity, k)."""
    pairs, before = Counter(train), Counter(previous for previous, _ in train)

    def perplexity(k: float) -> float:
        logs = (math.log((pairs[pair] + k) / (before[pair[0]] + k * vocabulary)) for pair in held_out)
        return math.exp(-sum(logs) / len(held_out))

    return min((perplexity(k), k) for k in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003))
