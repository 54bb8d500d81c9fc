"""What this layout refuses: combinations that DeepSpeed cannot serve exactly, each with one that works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collie_core.errors import PluginError, Refusal
from collie_core.registry import Registry

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_methods.deepspeed_layout.plugin import DeepSpeedLayoutPlugin

_NATIVE = {"layout": {"name": "native"}}


#: (whether it applies, rule, reason, what works, advice)
_Row = tuple[bool, str, str, dict[str, Any], str]


def refusals(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[str]:
    """Every refusal of this config: keys, reason, and what works."""
    rows = [*_of_layout(config, options), *_of_training(config, options)]
    found: list[str] = [
        Refusal(rule, reason, instead, advice) for applies, rule, reason, instead, advice in rows if applies
    ]
    return found + _of_optimizer(config, options.zero_stage)


def _of_layout(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[_Row]:
    """Of sizes, offloading and dtypes."""
    stage, dtype = options.zero_stage, config.model.dtype
    return [
        *(
            (
                size > 1,
                f"{key} {size}",
                "the layout deepspeed is data parallel alone",
                _NATIVE,
                f"set {key} to 1, or layout to {{name: native}}",
            )
            for key, size in (("tp_size", config.tp_size), ("pp_size", config.pp_size))
        ),
        (
            options.offload != "none" and stage == 0,
            f"layout.offload {options.offload} with layout.zero_stage 0",
            "DeepSpeed offloads with ZeRO",
            {"layout.zero_stage": 1},
            "set layout.zero_stage to 1, 2 or 3",
        ),
        (
            dtype == "float16",
            "model.dtype float16",
            "this layout does not drive DeepSpeed's loss scaling",
            {"model.dtype": "bfloat16"},
            "set it to bfloat16, or layout to {name: native}",
        ),
        (
            dtype == "bfloat16" and stage == 0,
            "model.dtype bfloat16 with layout.zero_stage 0",
            "DeepSpeed would sum gradients in bfloat16",
            {"layout.zero_stage": 1},
            "set zero_stage to 1 or more",
        ),
    ]


def _of_training(config: CollieConfig, options: DeepSpeedLayoutPlugin.Options) -> list[_Row]:
    """Of the step, the checkpoints and the operations."""
    stage, loss = options.zero_stage, config.ops.cross_entropy
    return [
        (
            config.optimizer.clip_grad_value is not None,
            "optimizer.clip_grad_value",
            "DeepSpeed clips by norm alone",
            {"optimizer.clip_grad_value": None},
            "use clip_grad_norm, or layout: {name: native}",
        ),
        (
            config.checkpoint.async_save,
            "checkpoint.async_save",
            "DeepSpeed's states are gathered while a checkpoint is written",
            {"checkpoint.async_save": False},
            "set it to false, or layout to {name: native}",
        ),
        (
            config.train.compile is True,
            "train.compile true",
            "DeepSpeed's hooks are not compiled",
            {"train.compile": False},
            "set it to false, or layout to {name: native}",
        ),
        (
            config.train.deterministic and options.offload != "none",
            "train.deterministic with layout.offload",
            "nothing says in which order DeepSpeed's update on the host computes",
            {"layout.offload": "none"},
            "set offload to none",
        ),
        (
            stage == 3 and loss not in ("auto", "plain"),
            f"ops.cross_entropy {loss} with layout.zero_stage 3",
            "it uses the head's weight where DeepSpeed has not gathered it",
            {"ops.cross_entropy": "plain"},
            "set it to auto or plain",
        ),
    ]


def _of_optimizer(config: CollieConfig, stage: int) -> list[str]:
    name = config.optimizer.name
    try:
        plugin = Registry().load("optimizer", name).cls
    except PluginError:  # told where the optimizer itself is selected
        return []
    native = f"layout: {{name: native, zero_stage: {stage}}}"
    if getattr(plugin, "in_backward", False) or config.optimizer.options.get("in_backward") is True:
        return [
            Refusal(
                f"optimizer {name}",
                "it updates parameters during the backward pass, which DeepSpeed has no place for",
                {"layout": {"name": "native", "zero_stage": stage}},
                f"the native equivalent is {native}",
            )
        ]
    if not hasattr(plugin, "torch_class"):
        return [
            Refusal(
                f"optimizer {name}",
                "it is no torch optimizer, which DeepSpeed needs",
                {"layout": {"name": "native", "zero_stage": stage}},
                f"the native equivalent is {native}",
            )
        ]
    if config.optimizer.options.get("state_dtype", "float32") != "float32":
        return [
            Refusal(
                f"optimizer {name} with optimizer.state_dtype",
                "DeepSpeed keeps the optimizer's states itself, in fp32",
                {"optimizer.state_dtype": "float32"},
                f"set it to float32, or {native}",
            )
        ]
    if stage and not getattr(plugin, "elementwise", True):
        return [
            Refusal(
                f"optimizer {name} with layout.zero_stage {stage}",
                "it needs every parameter whole, and DeepSpeed's ZeRO flattens them",
                {"layout.zero_stage": 0},
                "set layout.zero_stage to 0, or take an optimizer that works on each element by itself, "
                "such as adamw",
            )
        ]
    if stage in (1, 2) and name.rpartition(":")[2] == "adagrad":
        return [
            Refusal(
                f"optimizer {name} with layout.zero_stage {stage}",
                "DeepSpeed makes it anew without its parameter groups",
                {"layout.zero_stage": 3},
                f"set zero_stage to 0 or 3, or {native}",
            )
        ]
    return []
