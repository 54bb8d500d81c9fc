"""LoRA on a model: which linears, with which values, and in peft's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.plugin import (
    AdaptedLinear,
    CheckpointError,
    ConfigError,
    Piece,
    add_delta,
    block_linears,
    merge_deltas,
    nearest,
)
from collie_methods.lora import names
from collie_methods.lora.delta import LoraDelta
from collie_methods.lora.files import base_model, read_folder, refuse_others, write_folder
from collie_methods.lora.plugin import written
from collie_methods.lora.values import initial

if TYPE_CHECKING:
    from collie_core.run import Run
    from collie_core.shard import Shard
    from collie_methods.lora.plugin import LoraOptions

#: a delta's parameter -> its name in peft's files
_STORED = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_PREFIX = "base_model.model."

#: keys of a LoraConfig that change the result -> values that do not
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"), ()),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "exclude_modules"), ()),
    **dict.fromkeys(("lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"), ()),
    "bias": ("none",),
}


class LoraAdapter:
    """One entry of `adapters:`; see `collie_core.hookspecs.Adapter`."""

    def __init__(self, options: LoraOptions, run: Run) -> None:
        self.options, self.run, self.name = options, run, options.adapter_name
        self.paths: list[str] = []
        self._stock: dict[str, str] = {}
        self._known: list[str] = []
        self._read: dict[str, Tensor] = {}
        if options.path is not None:
            self.load(Path(options.path))

    # ------------------------------------------------------------ on the model
    def adapt(self, model: nn.Module) -> None:
        """A delta on every target.  Raises ConfigError for targets that are not there, or that have DoRA."""
        assert self.run.source is not None
        self._known = block_linears(model)
        self._stock = names.stock_names(self.run.source, model)
        options = self.options
        self.paths = self._loaded_paths() if options.path else names.chosen(model, options.target_modules)
        targets = options.target_modules
        if "target_modules" in written(options, self.run) and names.chosen(model, targets) != self.paths:
            has = names.as_targets(self.paths, self._known)
            raise ConfigError(f"target_modules: is {targets!r}, but {options.path} has {has}; leave it out")
        pissa = options.init_lora_weights.startswith("pissa")
        for path in self.paths:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            others = list(linear.adapters.values()) if isinstance(linear, AdaptedLinear) else []
            dora = options.use_dora or any(getattr(o, "magnitude", None) is not None for o in others)
            if others and dora:
                raise ConfigError(f"{path}: DoRA rescales the whole weight, so no other adapter may be there")
            least = min(linear.in_features, linear.out_features)
            if pissa and options.r > least:
                raise ConfigError(f"r: {options.r} is above the {least} singular values of {path}")
            delta = LoraDelta(
                linear,
                options.r,
                options.scaling,
                dropout=options.lora_dropout,
                dora=options.use_dora,
                pissa=pissa,
            )
            add_delta(model, path, self.name, delta)

    def initialise(self, name: str, values: Tensor, shard: Shard) -> None:
        """From the folder of `path`, or anew; whole weights are looked at by DoRA and PiSSA alone."""
        path, _, rest = name.partition(f".adapters.{self.name}.")
        if self._read:
            whole = self._read[self._file_name(path, rest)]
            if tuple(whole.shape) != shard.shape:
                raise CheckpointError(
                    f"{self.options.path}: {self._file_name(path, rest)} has shape {list(whole.shape)}, "
                    f"the model asks for {list(shard.shape)}"
                )
        else:
            weight = self.run.shards[f"{path}.weight"].gathered if _asks(self.options, rest) else _nothing
            whole = initial(self.options, rest, shard.shape, self.run.seed, name, weight)
        values.copy_(whole[Piece(values, shard.shape, shard.offsets).slices])

    def lr_scale(self, name: str) -> float:
        """LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354)."""
        return self.options.loraplus_lr_ratio if name.endswith(".lora_B") else 1.0

    def merge(self, model: nn.Module) -> None:
        """W + s B A, or what DoRA makes of it, in the place of W."""
        merge_deltas(model, self.name)

    # ------------------------------------------------------------ in files
    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """peft's layout.  PiSSA is written as the LoRA of twice the rank that changes the original weights
        alike, [A; start_A] and [B, -start_B]."""
        from peft import LoraConfig

        options = self.options
        pissa = options.init_lora_weights.startswith("pissa")
        r = 2 * options.r if pissa else options.r
        alpha = options.scaling * r if pissa else options.lora_alpha
        # peft says int, and divides by whatever it is
        whole: Any = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        stored = [self._stock.get(path, path) for path in self.paths]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model(self.run.config.model.path),
            inference_mode=True,
            r=r,
            lora_alpha=whole,
            lora_dropout=options.lora_dropout,
            use_rslora=options.use_rslora and not pissa,
            use_dora=options.use_dora,
            target_modules=names.as_targets(stored, [self._stock.get(path, path) for path in self._known]),
        )
        written: dict[str, Tensor] = {}
        for path in self.paths:
            own = f"{path}.adapters.{self.name}."
            found = {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
            if pissa:
                found["lora_A"] = torch.cat([found["lora_A"], found.pop("start_A")])
                found["lora_B"] = torch.cat([found["lora_B"], -found.pop("start_B")], 1)
            written |= {self._file_name(path, leaf): tensor for leaf, tensor in found.items()}
        write_folder(folder, config, written)

    def load(self, folder: Path) -> None:
        """Options and tensors of a folder in peft's layout.  Raises CheckpointError."""
        from peft import LoraConfig

        config, self._read = read_folder(folder, LoraConfig)
        refuse_others(folder, config, _NEUTRAL)
        self.options = replace(
            self.options,
            path=str(folder),
            r=config.r,
            lora_alpha=float(config.lora_alpha),
            use_rslora=bool(config.use_rslora),
            use_dora=bool(config.use_dora),
        )

    def _file_name(self, path: str, leaf: str) -> str:
        return f"{_PREFIX}{self._stock.get(path, path)}.{_STORED[leaf]}"

    def _loaded_paths(self) -> list[str]:
        """The linears that the folder has matrices for.  Raises CheckpointError where one is not there."""
        leaves = [leaf for leaf in _STORED if leaf != "magnitude" or self.options.use_dora]
        known = {self._file_name(path, leaf): path for path in self._known for leaf in leaves}
        for name in self._read:
            if name not in known:
                raise CheckpointError(
                    f"{self.options.path}: {name} fits no linear of the model's blocks{nearest(name, known)}"
                )
        paths = [path for path in self._known if path in {known[name] for name in self._read}]
        for path in paths:
            for leaf in leaves:
                if self._file_name(path, leaf) not in self._read:
                    raise CheckpointError(f"{self.options.path}: has no {self._file_name(path, leaf)}")
        return paths


def _asks(options: LoraOptions, leaf: str) -> bool:
    """Whether an initial value depends on the weight."""
    return leaf == "magnitude" or options.init_lora_weights.startswith("pissa")


def _nothing() -> Tensor:
    raise AssertionError("this value does not depend on the weight")
