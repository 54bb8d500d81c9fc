"""What this layout refuses: combinations that DeepSpeed cannot serve exactly, each with one that works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collie_core.errors import PluginError
from collie_core.registry import Registry

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_methods.deepspeed_layout.plugin import DeepSpeedLayoutPlugin


def refusals(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[str]:
    """Every refusal of this config: keys, reason, and what works."""
    found = [
        f"{key} {getattr(config, key)}: the layout deepspeed is data parallel alone; "
        f"set {key} to 1, or layout to {{name: native}}"
        for key in ("tp_size", "pp_size")
        if getattr(config, key) > 1
    ]
    rules = (
        (
            options.offload != "none" and options.zero_stage == 0,
            f"layout.offload {options.offload}: DeepSpeed offloads with ZeRO; set layout.zero_stage to 1, 2 or 3",
        ),
        (
            config.model.dtype == "float16",
            "model.dtype float16: this layout does not drive DeepSpeed's loss scaling; set it to bfloat16, "
            "or layout to {name: native}",
        ),
        (
            config.model.dtype == "bfloat16" and options.zero_stage == 0,
            "model.dtype bfloat16 with layout.zero_stage 0: DeepSpeed would sum gradients in bfloat16; "
            "set zero_stage to 1 or more",
        ),
        (
            config.optimizer.clip_grad_value is not None,
            "optimizer.clip_grad_value: DeepSpeed clips by norm alone; use clip_grad_norm, "
            "or layout: {name: native}",
        ),
        (
            config.checkpoint.async_save,
            "checkpoint.async_save: DeepSpeed's states are gathered for a save; set it to false, "
            "or layout to {name: native}",
        ),
        (
            config.train.compile is True,
            "train.compile: true: DeepSpeed's hooks are not compiled; set it to false, or layout to {name: native}",
        ),
        (
            config.train.deterministic and options.offload != "none",
            "train.deterministic with layout.offload: DeepSpeed's update on the host sums in no fixed order; "
            "set offload to none",
        ),
        (
            options.zero_stage == 3 and config.ops.cross_entropy not in ("auto", "plain"),
            f"ops.cross_entropy {config.ops.cross_entropy} with layout.zero_stage 3: it uses the head's weight "
            "where DeepSpeed has not gathered it; set it to auto or plain",
        ),
    )
    return found + [message for applies, message in rules if applies] + _of_optimizer(config, options)


def _of_optimizer(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[str]:
    name = config.optimizer.name
    try:
        plugin = Registry().load("optimizer", name).cls
    except PluginError:  # told where the optimizer itself is selected
        return []
    if getattr(plugin, "in_backward", False):
        return [
            f"optimizer {name}: it updates parameters during the backward pass, which DeepSpeed has no place for; "
            f"the native equivalent is layout: {{name: native, zero_stage: {options.zero_stage}}}"
        ]
    if options.zero_stage and not getattr(plugin, "elementwise", True):
        return [
            f"optimizer {name} needs every parameter whole, and ZeRO flattens them; set layout.zero_stage to 0, "
            "or take an optimizer that works on each element by itself, such as adamw"
        ]
    if options.zero_stage in (1, 2) and name.rpartition(":")[2] == "adagrad":
        return [
            f"optimizer {name} with layout.zero_stage {options.zero_stage}: DeepSpeed makes it anew without its "
            "groups; set zero_stage to 0 or 3, or layout to {name: native}"
        ]
    return []
