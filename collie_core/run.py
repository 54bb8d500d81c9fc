"""What every plugin is given of a run: its config, place, device, hooks, and the way to stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.shard import Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from collie_core.config.schema import CollieConfig
    from collie_core.hookspecs import Adapter
    from collie_core.models.provider import SelectedProvider


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning-rate factor and a weight decay.

    parameters: what this rank holds of each, updated in place; a plain tensor under every layout.
    lr_scale multiplies the step's learning rate.  shards: which box of the whole parameter each one is.
    """

    parameters: dict[str, nn.Parameter]
    lr_scale: float
    weight_decay: float
    shards: dict[str, Shard] = field(default_factory=dict)

    def shard(self, name: str) -> Shard:
        """This rank's part of a parameter; the whole of it where nothing cuts it."""
        found = self.shards.get(name)
        return Shard.whole(name, self.parameters[name]) if found is None else found


@dataclass
class Run:
    """One training run (or evaluation) in one process.

    step counts finished optimizer steps; total_steps is known once the data are, and so are the positions of
    the largest micro-batch, padding included.
    resolved holds every `auto` of the config as it was resolved.
    source is the checkpoint to train, its configs and its provider; model is the user's own module, whose
    weights are used instead, or None.
    loss_fn is the user's own loss, or None.
    control is the group in which hosts tell each other of things beside the model; None on one process.
    shards are this rank's parts of the parameters, by name, once a layout has placed them.
    virtual_tokens, of an adapter, are put before every record.
    added says which adapter added which parameter of the whole model; then all others are frozen.
    show gives a text to the monitors; None on a process that has none.
    model_built tells the plugins of the complete module, for them to change how it computes.
    """

    config: CollieConfig
    output_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    step: int = 0
    total_steps: int = 0
    largest_micro_batch: int = 0
    tokenizer: Any = None
    source: SelectedProvider | None = None
    model: nn.Module | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    loss_fn: Callable[..., Tensor] | None = None
    stop_reason: str | None = None
    control: ProcessGroup | None = None
    shards: dict[str, Shard] = field(default_factory=dict)
    virtual_tokens: int = 0
    added: dict[str, Adapter] = field(default_factory=dict)
    show: Callable[[str, str], None] | None = None
    model_built: Callable[[nn.Module], None] | None = None

    @property
    def first(self) -> bool:
        """True on the process that prints, and writes what is written once."""
        return self.rank == 0

    @property
    def seed(self) -> int:
        """The config's seed."""
        return self.config.seed

    @property
    def pad_token_id(self) -> int:
        """What fills rows: the tokenizer's pad token, else its end-of-sequence token, else 0."""
        for key in ("pad_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, key, None)
            if isinstance(token, int) and token >= 0:
                return token
        return 0

    def stop(self, reason: str) -> None:
        """End the run after this step, well: the checkpoint and the export are written."""
        self.stop_reason = self.stop_reason or reason

    def text(self, key: str, value: str) -> None:
        """Give every monitor a piece of text, such as a sample of what the model writes, for this step.

        Any process may call it; the monitors are on the first, and show what that one gives.
        """
        if self.show is not None:
            self.show(key, value)

    def parameter_groups(
        self, model: nn.Module, default_lr: float, default_weight_decay: float = 0.0
    ) -> list[ParameterGroup]:
        """Trainable parameters of `model`, grouped by learning-rate factor and weight decay.

        Norms, biases (every parameter of fewer than two dimensions) and embeddings are not decayed unless
        an entry of `optimizer.param_groups` that matches them says so; the first entry that matches wins.
        An adapter may scale the rate of its parameters, where no entry sets it.
        default_lr: where neither the config nor the run has a rate.
        """
        options = self.config.optimizer
        base_lr = self.resolved.get("optimizer.lr", default_lr) if options.lr is None else options.lr
        decay = options.weight_decay if options.weight_decay is not None else default_weight_decay
        groups: dict[tuple[float, float], dict[str, Shard]] = {}
        for name, shard in (self.shards or whole_shards(model)).items():
            if not shard.local.requires_grad:
                continue
            undecayed = len(shard.shape) < 2 or shard.embedding
            scale_of = getattr(self.added.get(name), "lr_scale", None)
            lr = base_lr if scale_of is None else base_lr * scale_of(name)
            weight_decay = 0.0 if undecayed else decay
            for entry in options.param_groups:
                if any(fnmatchcase(name, pattern) for pattern in entry.params):
                    lr = entry.lr if entry.lr is not None else lr
                    weight_decay = entry.weight_decay if entry.weight_decay is not None else weight_decay
                    break
            scale = lr / base_lr if base_lr else 1.0
            groups.setdefault((scale, weight_decay), {})[name] = shard
        return [
            ParameterGroup({name: shard.local for name, shard in members.items()}, *key, members)
            for key, members in groups.items()
        ]


def whole_shards(model: nn.Module) -> dict[str, Shard]:
    """Shards of a model that nothing cuts."""
    from torch import nn

    from collie_core.models.packed import packings

    packed = packings(model)
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: replace(Shard.whole(name, p, id(p) in embeddings), packing=packed.get(name))
        for name, p in model.named_parameters()
    }
