"""Checks across the keys of a config: sizes against processes, batch arithmetic, what a resume may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from collie_core.config.problems import ConfigProblems, Key
from collie_core.config.schema import CollieConfig, ScheduleSection

#: What may differ between a checkpoint and the run that resumes it (a section stands for all in it).
MAY_DIFFER: tuple[Key, ...] = (
    ("dp_size",),
    ("tp_size",),
    ("pp_size",),
    ("layout",),
    ("use_flash",),
    ("monitors",),
    ("evaluate",),
    ("data", "eval"),
    ("checkpoint",),
    ("ops",),
    ("output_dir",),
    ("train", "compile"),
    ("train", "activation_checkpointing"),
    ("train", "epochs"),
    ("train", "max_steps"),
    ("train", "on_nan"),
    ("train", "stop_grace"),
    # covered by the global batch, which is compared itself
    ("train", "micro_batch_size"),
    ("train", "gradient_accumulation_steps"),
    ("train", "global_batch_size"),
)


def processes() -> int:
    """Number of processes of this job, as torchrun or srun say it."""
    from collie_core.launch.world import current_world

    return current_world().size


def accumulation_steps(config: CollieConfig) -> int:
    """Micro-batches of a full optimizer step.  Raises ConfigProblems where the sizes do not divide."""
    train = config.train
    rows = train.micro_batch_size * config.dp_size
    arithmetic = f"micro_batch_size {train.micro_batch_size} x dp_size {config.dp_size} = {rows}"
    if train.global_batch_size is None:
        return train.gradient_accumulation_steps or 1
    if train.global_batch_size % rows:
        message = f"{train.global_batch_size} is no multiple of {arithmetic}"
        raise config.problems(ConfigProblems([(("train", "global_batch_size"), message)]))
    accumulation = train.global_batch_size // rows
    if train.gradient_accumulation_steps not in (None, accumulation):
        message = (
            f"{train.gradient_accumulation_steps} contradicts global_batch_size {train.global_batch_size}: "
            f"{arithmetic}, so it must be {accumulation} or left out"
        )
        raise config.problems(ConfigProblems([(("train", "gradient_accumulation_steps"), message)]))
    return accumulation


def global_batch_size(config: CollieConfig) -> int:
    """Rows of a full optimizer step over all data-parallel ranks."""
    return config.train.micro_batch_size * config.dp_size * accumulation_steps(config)


def product(config: CollieConfig) -> int:
    """The number of processes that the config's sizes make."""
    return config.dp_size * config.tp_size * config.pp_size


def arithmetic(config: CollieConfig) -> str:
    """`dp_size 2 x tp_size 1 x pp_size 1 = 2`."""
    sizes = f"dp_size {config.dp_size} x tp_size {config.tp_size} x pp_size {config.pp_size}"
    return f"{sizes} = {product(config)}"


def check_config(config: CollieConfig, world_size: int) -> None:
    """Everything that needs neither a plugin nor a file.  Raises ConfigProblems with all of it."""
    found: list[tuple[Key, str]] = []
    if product(config) != world_size:
        started = (
            f"; start the script with `torchrun --nproc-per-node {product(config)} SCRIPT` "
            "(collie train starts its processes itself)"
        )
        found.append(
            (
                ("dp_size",),
                f"{arithmetic(config)}, but the job has {world_size} process"
                f"{'es' if world_size > 1 else started}",
            )
        )
    schedule = config.schedule
    if schedule.min_ratio and schedule.name == "constant":
        found.append((("schedule", "min_ratio"), "constant never falls: leave it out, or name another"))
    if schedule.decay_ratio != ScheduleSection().decay_ratio and schedule.name != "wsd":
        found.append((("schedule", "decay_ratio"), f"is of wsd alone, and the schedule is {schedule.name}"))
    if schedule.warmup_steps is not None and schedule.warmup_ratio:
        found.append((("schedule", "warmup_steps"), "give warmup_steps or warmup_ratio, not both"))
    for name in ("train", "eval"):
        weights = [source.weight is None for source in getattr(config.data, name) or []]
        if any(weights) and not all(weights):
            found.append((("data", name), "give every source a weight, or none"))
    both = set(config.train.trainable) & set(config.train.frozen)
    if both:
        found.append((("train", "frozen"), f"{sorted(both)[0]!r} is also in train.trainable"))
    if found:
        raise config.problems(ConfigProblems(found))
    accumulation_steps(config)


def resume_differences(saved: Mapping[str, Any], config: CollieConfig) -> list[tuple[Key, str]]:
    """What the config changes of the run that it would resume, and may not."""
    found = [
        (path, f"is {new!r}, but the run to resume has {old!r}; use another output_dir, or set it back")
        for path, old, new in _differences(saved, config.to_mapping(), ())
        if not any(path[: len(free)] == free for free in MAY_DIFFER)
    ]
    before = CollieConfig(**{**saved, "output_dir": config.output_dir})
    if global_batch_size(before) != global_batch_size(config):
        found.append(_other_global_batch(before, config))
    return found


def _other_global_batch(before: CollieConfig, config: CollieConfig) -> tuple[Key, str]:
    """The first key that has changed, and the factors: then, now, and so that the rows stay as many."""
    rows = global_batch_size(before)
    dp_size = _largest_divisor(rows, config.dp_size)
    micro_batch_size = _largest_divisor(rows // dp_size, config.train.micro_batch_size)
    keep = _factors(micro_batch_size, rows // dp_size // micro_batch_size, dp_size)
    derived = config.train.global_batch_size is not None
    message = (
        f"the global batch is {_batch(config)}, but the run to resume has {_batch(before)}; set {keep}"
        f"{f', global_batch_size {rows}' if derived else ''}, or use another output_dir"
    )
    sizes = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    changed = [size for size in sizes if getattr(before.train, size) != getattr(config.train, size)]
    return (("train", changed[0]) if changed else ("dp_size",)), message


def _batch(config: CollieConfig) -> str:
    factors = _factors(config.train.micro_batch_size, accumulation_steps(config), config.dp_size)
    return f"{global_batch_size(config)} rows ({factors})"


def _factors(micro_batch_size: int, accumulation: int, dp_size: int) -> str:
    of_rank = f"micro_batch_size {micro_batch_size} x gradient_accumulation_steps {accumulation}"
    return f"{of_rank} x dp_size {dp_size}"


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _differences(old: Any, new: Any, path: Key) -> Iterator[tuple[Key, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path, old, new
