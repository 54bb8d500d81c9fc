"""What each rank of the native layout holds under a config, in words and numbers; nothing is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_core.config.checks import accumulation_steps, arithmetic

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.layouts.options import NativeOptions


_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def held(config: CollieConfig, options: NativeOptions) -> dict[str, str]:
    """Text by topic: processes, weights, gradients, optimizer states, and the pipeline's micro-batches."""
    cut = _cut(config, options)
    said = {
        "processes": arithmetic(config),
        "weights": _weights(config, options),
        "gradients": _gradients(config, options),
        "optimizer states": "of the weights that this rank keeps between steps"
        + (f", about 1/{cut} of all" if cut > 1 else ""),
    }
    said["updates inside the backward pass"] = _fused(config, options)
    if config.pp_size > 1:
        said["pipeline"] = _pipeline(config, options)
    if options.offload == "cpu":
        visit = "a block's, each time it runs" if options.zero_stage == 3 else "all, from forward to backward"
        said["offload"] = f"weights, gradients and states are in host memory; weights on the device: {visit}"
    return said


def _cut(config: CollieConfig, options: NativeOptions) -> int:
    """Ranks among which a matrix is cut between steps."""
    zero = options.zero_stage > 0
    return config.tp_size * config.pp_size * (config.dp_size if zero else 1)


def _bytes(value: float) -> str:
    """For a text's end; of the whole model's parameters, so that ranks can be compared."""
    return f" ({value:.3g} bytes per parameter of the model)"


def _weights(config: CollieConfig, options: NativeOptions) -> str:
    parts = ["all of the model" if config.pp_size == 1 else f"those of one of {config.pp_size} stages"]
    if config.tp_size > 1:
        parts.append(f"1/{config.tp_size} of every matrix that the model's plan cuts, the rest whole")
    if options.zero_stage > 0 and config.dp_size > 1:
        if options.zero_stage == 3:
            gathered = "a block is gathered each time it runs"
        else:
            gathered = "all are gathered from the forward to the end of the backward pass"
        parts.append(f"of this 1/{config.dp_size} (zero_stage {options.zero_stage}); {gathered}")
    return ", ".join(parts) + _bytes(_WIDTH[config.model.dtype] / _cut(config, options))


def _gradients(config: CollieConfig, options: NativeOptions) -> str:
    """At the update; sums over micro-batches or ranks are in fp32."""
    several, width = micro_batches(config, options) > 1, _WIDTH[config.model.dtype]
    if options.zero_stage == 0 or config.dp_size == 1:
        text = "of the weights that this rank holds"
        if config.dp_size > 1:
            text += f", summed over {config.dp_size} ranks at the last micro-batch"
        width = 4 if several or config.dp_size > 1 else width
    elif options.zero_stage == 1 or config.pp_size > 1:
        text = f"whole until the last micro-batch, then 1/{config.dp_size}"
    else:
        text = f"1/{config.dp_size}, and whole ones of the block that runs"
        width = 4 if several else width
    return text + _bytes(width / _cut(config, options))


def _fused(config: CollieConfig, options: NativeOptions) -> str:
    if options.offload == "cpu":
        return "after the backward pass: gradients are on their way to host memory until then"
    if micro_batches(config, options) > 1:
        return "after the last of several micro-batches; gradients are kept until then"
    return "each gradient is freed at once, unless the norm is wanted in one pass"


def micro_batches(config: CollieConfig, options: NativeOptions) -> int:
    """Micro-batches of a full step on one rank."""
    rows = config.train.micro_batch_size * accumulation_steps(config)
    return min(rows, options.micro_batches(rows, config.train.micro_batch_size, config.pp_size))


def passes_alive(config: CollieConfig, options: NativeOptions, rank: int) -> int:
    """The most passes that a rank of a pipeline has begun and not ended at any time of a full step."""
    from collie_core.layouts.pipeline import actions, most_alive

    ranks = config.pp_size
    if ranks == 1:
        return 1
    count, stretches = micro_batches(config, options), options.stretches(ranks)
    return most_alive(actions(options.pp_schedule, ranks, rank, stretches, count))


def _pipeline(config: CollieConfig, options: NativeOptions) -> str:
    rows = config.train.micro_batch_size * accumulation_steps(config)
    count, ranks = micro_batches(config, options), config.pp_size
    stretches = options.stretches(ranks)
    alive = [str(passes_alive(config, options, rank)) for rank in range(ranks)]
    least, more = divmod(rows, count)
    idle = (ranks - 1) / (stretches * count + ranks - 1)
    through = f", each through {stretches} stretches of blocks a rank" if stretches > 1 else ""
    return (
        f"{options.pp_schedule}: {rows} rows a rank and step in {count} micro-batches of "
        f"{least if not more else f'{least} to {least + 1}'} rows{through}; activations of at most "
        f"{', '.join(alive)} of them on ranks 0 to {ranks - 1}; about {idle:.0%} of the time idle"
    )
