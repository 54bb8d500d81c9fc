"""Learning-rate schedules in closed form: a factor for every step, with no state to save."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.schema import ScheduleSection


def learning_rate_factor(section: ScheduleSection, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied with at `step`, counted from 1, of `total_steps`.

    Warm-up of W steps: step / W, so that the first step trains and step W has the full rate.  After it, with
    x = (step - 1 - W) / (total_steps - W), which is 0 at step W + 1 and stays below 1 at the last step:

    - constant: 1
    - linear: 1 - x
    - cosine: (1 + cos(pi x)) / 2
    - wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395, with a linear decay): 1, then over the
      last D = decay_ratio * total_steps steps from 1 down to 1 / D

    each mapped from 1..0 to 1..min_ratio.  No step has rate 0: under `linear` with no minimum the last one
    has 1 / (total_steps - W).

    W is warmup_steps, or warmup_ratio * total_steps rounded up.
    """
    warmup = section.warmup_steps
    if warmup is None:
        warmup = math.ceil(section.warmup_ratio * total_steps)
    if step <= warmup:
        return step / warmup
    done, remaining = step - 1 - warmup, max(1, total_steps - warmup)
    if section.name == "constant":
        shape = 1.0
    elif section.name == "linear":
        shape = 1.0 - min(1.0, done / remaining)
    elif section.name == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done / remaining)))
    else:
        decay = min(remaining, max(1, round(section.decay_ratio * total_steps)))
        shape = 1.0 - min(1.0, max(0, done - (remaining - decay)) / decay)
    return section.min_ratio + (1.0 - section.min_ratio) * shape
