"""What a config selects: `plugins: [{name: float8, recipe: rowwise}]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from collie_core.errors import ConfigError, Refusal, listed
from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from collie_core.plugin import AdaptedLinear
    from collie_core.run import Run

_MULTIPLE = 16  # of the sizes of a matrix that tensor cores multiply in float8
_CAPABILITY = (8, 9)  # the first of CUDA devices that have float8: Ada; Hopper is 9.0
_SCALES = {"tensorwise": "a scale for each tensor", "rowwise": "a scale for each row of each tensor"}


@dataclass(frozen=True, kw_only=True)
class Float8Options:
    """Keys of an entry of `plugins:`.

    recipe: tensorwise: one scale for a whole tensor, the fastest; rowwise: one for each row, closer to bf16.
    skip_modules: names or patterns of linears in the blocks that stay as they are: o_proj, blocks.0.*.
    emulate: round to float8 but multiply in fp32, on any device; slow, for tests.
    """

    recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    skip_modules: tuple[str, ...] = ()
    emulate: bool = False


class Float8Plugin:
    """Linears that multiply in float8 while training (Micikevicius et al. 2022, arXiv 2209.05433)."""

    collie_api = 1
    Options = Float8Options

    def __init__(self, options: Float8Options) -> None:
        self.options = options
        self._changed: list[AdaptedLinear] = []

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What float8 cannot go together with."""
        found: list[str] = []
        config = run.config
        if config.tp_size > 1:
            found.append(
                Refusal(
                    "plugin float8 with tp_size",
                    "a scale comes from a whole tensor, and tensor parallelism cuts it",
                    {"tp_size": 1},
                    "set tp_size to 1; dp_size with zero_stage, and pp_size, share the weights too",
                )
            )
        if config.layout.name.rpartition(":")[2] == "deepspeed":
            found.append(
                Refusal(
                    "plugin float8 and layout deepspeed",
                    "its ZeRO-3 takes weights away that float8 products still need",
                    {"layout": {"name": "native", "zero_stage": 3}},
                    "set layout to {name: native, zero_stage: 3}",
                )
            )
        packed = [s.name for s in config.adapters if s.name.rpartition(":")[2] in ("nf4", "int8")]
        if packed:
            found.append(
                f"adapter {packed[0]} stores the weights in another form than float8 multiplies; "
                "keep one of the two"
            )
        if sum(section.name.rpartition(":")[2] == "float8" for section in config.plugins) > 1:
            found.append("plugins has it more than once; keep one of them")
        return found

    @hookimpl
    def collie_explain(self, run: Run) -> Mapping[str, str]:
        """What is computed in float8."""
        left = f", but {', '.join(self.options.skip_modules)}" if self.options.skip_modules else ""
        how = ", emulated in fp32" if self.options.emulate else ""
        text = f"float8 products while training, {_SCALES[self.options.recipe]}{how}{left}"
        return {"linears of the blocks": text}

    @hookimpl
    def collie_model_built(self, run: Run, model: nn.Module, training: bool) -> None:
        """Raises ConfigError for a device without float8 and for linears that cannot multiply so, by name."""
        self._restore()
        if not training:
            return
        if not self.options.emulate:
            _check_device(run.device)
        from collie_core.plugin import adapted_linear, block_linears
        from collie_methods.float8.product import Float8Product

        paths = block_linears(model, self.options.skip_modules)
        _check_linears(model, paths)
        multiply = Float8Product(self.options.recipe, self.options.emulate)
        for path in paths:
            linear = adapted_linear(model, path)
            linear.multiply = multiply
            self._changed.append(linear)
        run.resolved["float8"] = {
            "recipe": self.options.recipe,
            "emulated": self.options.emulate,
            "linears": len(paths),
        }

    @hookimpl
    def collie_run_end(self) -> None:
        """A model that the user gave computes as before."""
        self._restore()

    def _restore(self) -> None:
        for linear in self._changed:
            linear.multiply = None
        self._changed = []


def _check_device(device: torch.device) -> None:
    import torch

    if device.type != "cuda":
        raise ConfigError(f"plugin float8: needs a CUDA device with float8, but the run is on {device.type}")
    has = torch.cuda.get_device_capability(device)
    if has < _CAPABILITY:
        raise ConfigError(
            f"plugin float8: {torch.cuda.get_device_name(device)} has no float8: its compute capability is "
            f"{'.'.join(map(str, has))}, expected {'.'.join(map(str, _CAPABILITY))} or more"
        )


def _check_linears(model: nn.Module, paths: list[str]) -> None:
    from torch import nn

    if not paths:
        raise ConfigError("plugin float8: the model's blocks have no linear that it could change")
    wrong = []
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if getattr(linear, "packing", None) is not None:
            raise ConfigError(f"plugin float8: the weight of {path} is quantised; keep one of the two")
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            wrong.append(f"{path} ({linear.in_features} to {linear.out_features})")
    if wrong:
        raise ConfigError(
            f"plugin float8: inputs and outputs must be multiples of {_MULTIPLE}: {listed(wrong)}; "
            "leave these out by skip_modules"
        )
