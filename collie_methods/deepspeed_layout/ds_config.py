"""The config that DeepSpeed is given: what follows from the run's own keys, over the user's `ds_config`.

Keys that the run settles must agree with it: DeepSpeed would otherwise train something else without a word
(its own `gradient_clipping`, left out, is 1.0).  https://www.deepspeed.ai/docs/config-json/ has all keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.config.checks import accumulation_steps
from collie_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_methods.deepspeed_layout.plugin import DeepSpeedLayoutPlugin

AUTO = "auto"

#: DeepSpeed's keys that are settled elsewhere -> where
_ELSEWHERE = {
    "scheduler": "schedule",
    "activation_checkpointing": "train.activation_checkpointing",
    "tensorboard": "monitors",
    "wandb": "monitors",
    "csv_monitor": "monitors",
    "comet": "monitors",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "tensor_parallel": "tp_size",
    "pipeline": "pp_size",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "managed_gradient_accumulation": "train.gradient_accumulation_steps",
}
#: DeepSpeed's keys that may be given beside those of `_settled`
_SERVED = (
    "aio",
    "communication_data_type",
    "comms_logger",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


def problems(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[str]:
    """What of the user's ds_config contradicts the run, or is nothing that DeepSpeed reads.

    Raises ConfigError for a file that cannot be read.
    """
    given = _given(options)
    settled = _settled(config, options)
    found = []
    for key, value in given.items():
        if key == "optimizer":
            name = value.get("type", value) if isinstance(value, Mapping) else value
            found.append(
                f"layout.ds_config: optimizer {name!r} stands against optimizer.name "
                f"{config.optimizer.name!r}, which is what trains; leave it out of ds_config"
            )
        elif key in _ELSEWHERE:
            own = _ELSEWHERE[key]
            found.append(
                f"layout.ds_config: {key} {json.dumps(value)} stands against {own}, which settles it "
                f"({own}: {_shown(config, own)}); leave it out of ds_config"
            )
        elif key not in settled and key not in _SERVED:
            found.append(f"layout.ds_config: unknown key {key!r}{nearest(key, [*settled, *_SERVED])}")
    own_keys = _own_keys(config, options)
    for path, ours in _leaves(settled):
        theirs = _at(given, path)
        if theirs not in (None, AUTO) and theirs != ours:
            found.append(
                f"layout.ds_config: {'.'.join(path)} {json.dumps(theirs)} contradicts "
                f"{own_keys['.'.join(path)]}, which makes it {json.dumps(ours)}; leave it out, "
                f"write {json.dumps(AUTO)}, or make both agree"
            )
    return found


def effective(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> dict[str, Any]:
    """The config for `deepspeed.initialize`: the run's keys over the user's; "auto" elsewhere is left out."""
    merged = _merged(_without_auto(_given(options)), _settled(config, options))
    if options.offload != "none" and _force_cpu_optimizer(options) is None:
        merged["zero_force_ds_cpu_optimizer"] = False  # the layout takes the best that is there
    merged["zero_allow_untested_optimizer"] = True  # any that works on each element by itself
    merged.setdefault("steps_per_print", None)
    return merged


def wants_ds_cpu_optimizer(options: DeepSpeedLayoutPlugin.Options) -> bool:
    """Whether offloaded states may be updated by DeepSpeed's own Adam; its key zero_force_ds_cpu_optimizer
    forbids it with false."""
    return options.offload != "none" and _force_cpu_optimizer(options) is not False


def _force_cpu_optimizer(options: DeepSpeedLayoutPlugin.Options) -> Any:
    value = _given(options).get("zero_force_ds_cpu_optimizer")
    return None if value == AUTO else value


def _settled(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> dict[str, Any]:
    """DeepSpeed's keys that follow from the run's."""
    micro, accumulation = config.train.micro_batch_size, accumulation_steps(config)
    weights_too = options.offload == "cpu" and options.zero_stage == 3
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "offload_optimizer": {"device": "none" if options.offload == "none" else "cpu"},
        "offload_param": {"device": "cpu" if weights_too else "none"},
    }
    settled: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * config.dp_size,
        "gradient_clipping": config.optimizer.clip_grad_norm or 0.0,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "fp16": {"enabled": config.model.dtype == "float16"},
        "zero_optimization": zero,
    }
    if options.zero_stage:
        zero["compute_grad_norm"] = True
        settled["data_types"] = {"grad_accum_dtype": "fp32"}
    if settled["bf16"]["enabled"]:
        settled["bf16"]["check_grad_overflow"] = True
    return settled


def _own_keys(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> dict[str, str]:
    """DeepSpeed's key -> the run's, with its value."""
    train = config.train
    rows = f"train.micro_batch_size {train.micro_batch_size}"
    accumulation = f"train.gradient_accumulation_steps {accumulation_steps(config)}"
    dtype, stage = f"model.dtype {config.model.dtype}", f"layout.zero_stage {options.zero_stage}"
    offload = f"layout.offload {options.offload}"
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": f"{rows} x {accumulation} x dp_size {config.dp_size}",
        "gradient_clipping": f"optimizer.clip_grad_norm {json.dumps(config.optimizer.clip_grad_norm)}",
        "bf16.enabled": dtype,
        "bf16.check_grad_overflow": f"train.on_nan {train.on_nan}",
        "fp16.enabled": dtype,
        "zero_optimization.stage": stage,
        "zero_optimization.compute_grad_norm": "the grad_norm that is reported",
        "zero_optimization.offload_optimizer.device": offload,
        "zero_optimization.offload_param.device": offload,
        "data_types.grad_accum_dtype": "the sum of gradients in fp32",
    }


def _given(options: DeepSpeedLayoutPlugin.Options) -> dict[str, Any]:
    """The user's ds_config.  Raises ConfigError, naming the file, where there is no JSON object."""
    source = options.ds_config
    if source is None:
        return {}
    if isinstance(source, dict):
        return source
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"layout.ds_config: {source} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"layout.ds_config: {source} is no JSON: {error}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ConfigError(f"layout.ds_config: {source} holds {kind}, expected an object of keys")
    return found


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` with `high` over it, mapping by mapping."""
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def _without_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in given.items()
        if value != AUTO
    }


def _leaves(mapping: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _at(mapping: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(key)
    return mapping


def _shown(config: CollieConfig, key: str) -> str:
    value: Any = config.to_mapping()
    for part in key.split("."):
        value = value[part]
    return json.dumps(value)
