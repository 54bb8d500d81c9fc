"""What a config selects: `adapters: [{name: lora, r: 8}]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collie_core.errors import Refusal
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import Adapter
    from collie_core.run import Run

_NAMED = ("lora", "prompt_tuning", "p_tuning", "prefix_tuning")
#: options that a folder of `path` may be trained further with, and one that is compared on the model
_BESIDE_PATH = ("lora_dropout", "loraplus_lr_ratio", "target_modules")
#: options that the folder has too -> peft's default where it says nothing
_SAVED: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False}


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Keys of an entry of `adapters:`, by peft's names.

    r: the rank.  lora_alpha: the change of a weight is B A times lora_alpha / r (use_rslora: / sqrt(r)).
    target_modules: `all-linear`, `attention` or `mlp`, the linears of the blocks or some of them, whatever
    the family calls them; or names or patterns of modules, such as q_proj or blocks.0.*.
    lora_dropout: of what goes into A.  use_dora: the length of each row of the weight is trained apart.
    init_lora_weights: of A, B being 0: `default` (uniform) or `gaussian`; `pissa` (the largest singular
    values of the weight) or `pissa_niter_4` (the same, found in so many iterations).
    loraplus_lr_ratio: the learning rate of B over that of A.
    adapter_name: tells several adapters apart.  path: the folder of an adapter to go on with, which then
    says rank, modules and all else; what is written beside it must be the same.
    """

    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: (
        Literal["default", "gaussian", "pissa"] | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = "default"
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    adapter_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "default"
    path: str | None = None

    @property
    def scaling(self) -> float:
        """What B A is multiplied with; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


class LoraPlugin:
    """LoRA (Hu et al. 2021, arXiv 2106.09685), with rsLoRA, DoRA, LoRA+ and PiSSA."""

    collie_api = 1
    supports = ("zero", "tp", "pp", "deepspeed", "packing")
    default_lr_factor = 10.0  # Schulman and Thinking Machines 2025, "LoRA Without Regret"
    Options = LoraOptions

    def __init__(self, options: LoraOptions) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """Options that contradict each other, or the layout."""
        options = self.options
        found = same_names(run) + beside_path(options, run, _SAVED, _BESIDE_PATH)
        if not options.target_modules:
            found.append("target_modules: names no linear; leave it out for all-linear")
        if options.use_dora or options.init_lora_weights.startswith("pissa"):
            key = "use_dora" if options.use_dora else "init_lora_weights: pissa"
            why = "it looks at whole weights, which DeepSpeed has cut"
            found += deepspeed_zero3(run, f"lora with {key} and", why)
        return found

    @hookimpl
    def collie_adapter(self, run: Run) -> Adapter:
        """The adapter of this run."""
        from collie_methods.lora.adapter import LoraAdapter

        return LoraAdapter(self.options, run)


def written(options: Any, run: Run) -> Mapping[str, Any]:
    """The keys that the config has beside the `path` of these options, values that are defaults included."""
    if options.path is None:
        return {}
    for section in run.config.adapters:
        own = section.options
        same_folder = Path(str(own.get("path"))) == Path(options.path)
        if same_folder and own.get("adapter_name", "default") == options.adapter_name:
            return {key: value for key, value in own.items() if key not in ("path", "adapter_name")}
    return {}  # the adapter of a folder in model.path, which the config does not describe


def beside_path(options: Any, run: Run, saved: Mapping[str, Any], allowed: tuple[str, ...] = ()) -> list[str]:
    """What is written beside `path` and differs from what its folder says, or is of a new adapter alone.

    saved: what the folder says, with peft's defaults.  allowed: options that are not compared here.
    """
    found, folder = [], saved_config(options.path)
    for key in written(options, run):
        value = getattr(options, key)
        if key in saved:
            has = folder.get(key, saved[key])
            if folder and value != has:
                found.append(f"{key}: is {value!r}, but {options.path} has {has!r}; leave it out")
        elif key not in allowed:
            found.append(f"{key}: is {value!r}, but of a new adapter alone, and path names one; leave it out")
    return found


def saved_config(path: str | None) -> Mapping[str, Any]:
    """What an adapter's folder says; nothing where it cannot be read, which is told when it is loaded."""
    if path is None:
        return {}
    try:
        content = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def deepspeed_zero3(run: Run, what: str, reason: str) -> list[str]:
    """The refusal of DeepSpeed's ZeRO 3; none under another layout or stage."""
    layout = run.config.layout
    if layout.name.rpartition(":")[2] != "deepspeed" or layout.options.get("zero_stage") != 3:
        return []
    return [
        Refusal(
            f"adapter {what} layout deepspeed with zero_stage 3",
            reason,
            {"layout": {"name": "native", "zero_stage": 3}},
            "set layout to {name: native, zero_stage: 3}, or zero_stage to 2",
        )
    ]


def same_names(run: Run) -> list[str]:
    """Every adapter of a run needs a name of its own, but for those of other plugins that have none."""
    names = [
        section.options.get("adapter_name", "default")
        for section in run.config.adapters
        if section.name.rpartition(":")[2] in _NAMED or "adapter_name" in section.options
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    return [f"adapter_name: {twice!r} is the name of two adapters; give one another"] if twice else []
