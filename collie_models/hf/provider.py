"""What the engine knows of a model of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from collie_core.plugin import CheckpointError, ConfigError, ParallelPlan, Relative, Rename, WeightRule
from collie_models.hf.anatomy import Anatomy, dissect
from collie_models.hf.attention import NAME
from collie_models.hf.config import read_config
from collie_models.hf.model import TransformersForCausalLM
from collie_models.hf.parallel import parallel_plan
from collie_models.hf.stored import ignored, stored_names

if TYPE_CHECKING:
    from collie_core.ops import Ops


class TransformersProvider:
    """The provider of one checkpoint (folder `path`), or of a config without weights (None)."""

    template: str | None = None
    export_as: Mapping[str, Relative] = {}

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._dissected: tuple[str, Anatomy] | None = None

    def read_config(self, hf_config: Mapping[str, Any]) -> PreTrainedConfig:
        """The library's config.  Raises ConfigError for what it or this plugin cannot do, by name."""
        return read_config(hf_config)

    def build(self, config: PreTrainedConfig, ops: Ops) -> TransformersForCausalLM:
        """The stock module on meta, its parts re-housed.  Raises ConfigError where it has no such parts."""
        stock = _stock(config)
        return TransformersForCausalLM(stock, self._anatomy(config, stock), ops)

    def weight_map(self, config: PreTrainedConfig) -> Sequence[WeightRule]:
        """The library's names as the checkpoint spells them."""
        stock = _stock(config)
        anatomy = self._anatomy(config, stock)
        names = stored_names(self.path, stock)
        rules: list[WeightRule] = [Rename(stored, anatomy.renamed(name)) for name, stored in names.items()]
        return rules + ignored(stock)

    def parallel_plan(self, config: PreTrainedConfig) -> ParallelPlan:
        """The library's own plan, as far as this engine computes it."""
        stock = _stock(config)
        return parallel_plan(config, stock, self._anatomy(config, stock))

    def positions(self, config: PreTrainedConfig) -> int | None:
        """How many positions the model has learned; None where they are computed."""
        stock = _stock(config)
        words, stated = stock.get_input_embeddings(), getattr(config, "max_position_embeddings", None)
        if stated is None:
            return None
        tables = [m for m in stock.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
        learned = any(stated <= table.num_embeddings <= stated + 2 for table in tables)  # OPT has two more
        return int(stated) if learned else None

    def tokenizer(self, path: Path) -> Any:
        """The library's tokenizer, from local files alone; no code of the folder is run."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds for a missing or damaged file
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: no tokenizer that transformers can read: {reason}") from None

    def _anatomy(self, config: PreTrainedConfig, stock: PreTrainedModel) -> Anatomy:
        key = json.dumps(config.to_dict(), sort_keys=True, default=str)
        if self._dissected is None or self._dissected[0] != key:
            try:
                self._dissected = key, dissect(stock, config.num_hidden_layers)
            except ConfigError as error:
                raise ConfigError(f"model_type {config.model_type!r} is not supported: {error}") from None
        return self._dissected[1]


def _stock(config: PreTrainedConfig) -> PreTrainedModel:
    """The library's own model on meta, its attention ours."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=NAME, trust_remote_code=False
            )
    except KeyError:
        raise ConfigError(
            f"model_type {config.model_type!r}: its attention does not go through transformers' interface"
        ) from None
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model_type {config.model_type!r}: transformers cannot make this model: {reason}"
        ) from None
    assert isinstance(model, PreTrainedModel)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # it would look into the ids; padding is the engine's affair
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]
    return model


def _no_warning(*args: Any) -> None:
    pass
