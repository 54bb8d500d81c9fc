"""`AutoModelForCausalLM` and `AutoTokenizer`: any installed family by its folder or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from collie_core.config.checks import product
from collie_core.errors import UserError
from collie_core.models.causal_lm import CausalLM, Origin, adopt
from collie_core.models.initialise import initialise
from collie_core.models.provider import SelectedProvider, provider_for, select_provider
from collie_core.models.sources import load_selected
from collie_core.ops import Ops, select_ops

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig

UseFlash = bool | Literal["auto"]


class AutoModelForCausalLM:
    """Makes models; it has no instances.  A path may also be a run's folder or a checkpoint."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        use_flash: UseFlash | None = None,
        config: CollieConfig | None = None,
        provider: str | None = None,
        revision: str | None = None,
    ) -> CausalLM:
        """The model in a folder in Hugging Face layout, or of a hub id, on the CPU.

        dtype: of the weights; None: config.model.dtype, without a config float32.  use_flash: None: the
        config's, else false.  provider: a model plugin's name, instead of the checkpoint's model_type.
        The adapters of an adapter's folder, or of a run that trained some, are on the model
        (`merge_adapters` folds them in).
        With a config whose dp_size * tp_size * pp_size is above 1 the module stays on meta, remembering its
        folder, for the Trainer to prepare.  Weights stored in the wanted dtype are pages of their file: they
        are read when they are used, and the file may be replaced or deleted, but not written into, meanwhile.
        Raises CheckpointError, ConfigError or PluginError, each naming file and key or tensors.
        """
        ops = _ops(config, use_flash)
        if config is not None:
            provider, revision = provider or config.model.provider, revision or config.model.revision
            dtype = dtype or getattr(torch, config.model.dtype)
        selected = select_provider(path, provider=provider, revision=revision)
        model = build_model(selected, ops, selected.path)
        alone = config is None or product(config) == 1
        how: dict[str, Any] = {"device": "cpu", "dtype": dtype or torch.float32, "map_files": True}
        if selected.adapters:
            if not alone:
                raise UserError(f"{path}: has adapters; with sizes above 1 name it in the Trainer's config")
            from collie_core.models.adapters import load_adapted

            model.adapters = load_adapted(model, selected, **how)
        elif alone:
            load_selected(model, selected, **how)
        return model

    @classmethod
    def from_config(
        cls,
        hf_config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        use_flash: UseFlash = False,
        provider: str | None = None,
    ) -> CausalLM:
        """A model with random weights for the contents of a `config.json`.

        Matrices are normal with deviation `initializer_range` (0.02 where absent), norms 1, biases 0; every
        value is a function of seed and parameter name alone.
        """
        selected = provider_for(hf_config, None, provider)
        model = build_model(selected, _ops(None, use_flash), None)
        std = hf_config.get("initializer_range", 0.02)
        initialise(model, seed, std, dtype)
        return model


class AutoTokenizer:
    """Makes tokenizers; it has no instances."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, provider: str | None = None, revision: str | None = None
    ) -> Any:
        """The tokenizer in a folder or hub repository, with the interface of transformers; no code is run."""
        selected = select_provider(path, provider, revision, weights=False)
        return selected.provider.tokenizer(selected.path)


def _ops(config: CollieConfig | None, use_flash: UseFlash | None) -> Ops:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config is None:
        return select_ops(use_flash=use_flash or False, device=device)
    flash = config.use_flash if use_flash is None else use_flash
    return select_ops(config.ops.attention, config.ops.cross_entropy, flash, device)


def build_model(selected: SelectedProvider, ops: Ops | None = None, path: Path | None = None) -> CausalLM:
    """The module on meta, with the methods of `CausalLM` whatever its class."""
    with torch.device("meta"):
        model = adopt(selected.provider.build(selected.config, ops or select_ops()))
    model.origin = Origin(selected.provider, selected.config, selected.hf_config, path)
    return model
