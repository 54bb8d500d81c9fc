"""The whole contract between the core and its plugins, in one file; importing it imports no torch.

An entry point (groups below) names a class with `collie_api = 1`, a nested `Options` (a plain frozen
dataclass) and methods marked `@hookimpl`.  The core validates the config section, makes one instance a
section, `cls(options)`, and registers it in the run's own plugin manager as `kind:index:name`.
A hook implementation takes only the arguments that it needs, by name.
A model plugin may state literals for `collie models`: `supports`, a tuple of words, and `checkpoints`, a
tuple of mappings with `name` and, where known, `parameters` and `licence`.
Optimizers and adapters may state literals for `collie methods`: `supports`, what they can be combined with
(`zero`, `tp`, `pp`, ...), and optimizers `in_backward` and `state_bytes`, the bytes of state by options and
by what has them: {"": {"element": 8}, "state_dtype: bfloat16": {"element": 4}}.  Those that have them:
`element` (of any parameter), `vector element` (of one of fewer than two dimensions), `matrix element` and
`row` and `column` (of the others); `block matrix element` (of a matrix of a block) and `other element`.
An adapter that packs the linears of the blocks states `weight_bytes`, the bytes of a parameter of theirs by
options: {"": 0.5625, "block_size: 32": 0.625}.

Shapes: B rows, S positions, H heads, D head width, E hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:  # names for readers and mypy only
    from torch import Tensor, nn

    from collie_core.data.batch import MicroBatch, StepBatch
    from collie_core.models.weight_map import ParallelPlan, Relative, WeightRule
    from collie_core.ops import Ops
    from collie_core.run import Run
    from collie_core.shard import Piece, Shard

hookspec = pluggy.HookspecMarker("collie")
hookimpl = pluggy.HookimplMarker("collie")

API_VERSION = 1

#: kind -> entry-point group.  The entry point's name is what a config says; for models, the `model_type`.
GROUPS = {
    "model": "collie.models",
    "layout": "collie.layouts",
    "optimizer": "collie.optimizers",
    "adapter": "collie.adapters",
    "monitor": "collie.monitors",
    "plugin": "collie.plugins",
}

#: kind -> the hook that a plugin of this kind must implement (a `plugin` only listens).
REQUIRED_HOOK = {
    "model": "collie_model_provider",
    "layout": "collie_layout",
    "optimizer": "collie_optimizer",
    "adapter": "collie_adapter",
    "monitor": "collie_monitor",
}


# ---------------------------------------------------------------- what the factories return
@runtime_checkable
class ModelProvider(Protocol):
    """Everything the engine must know of one model family."""

    @property
    def template(self) -> str | None:
        """Chat template (Jinja) for records with messages where the tokenizer has none."""

    @property
    def export_as(self) -> Mapping[str, Relative]:
        """Native relatives that `collie export --as NAME` can write; may be empty."""

    def read_config(self, hf_config: Mapping[str, Any]) -> Any:
        """The family's own config from the mapping in `config.json`.

        Raises ConfigError for a key or value that the family does not support; never ignores one that
        changes the result.
        """

    def build(self, config: Any, ops: Ops) -> nn.Module:
        """The complete module, called under `torch.device("meta")`.

        The module has three children: `embed(input_ids, ctx) -> (B, S, E)`, `blocks`, a ModuleDict keyed
        by the global index as a string, each `block(h, ctx) -> h`, and `head(h, ctx) -> logits (..., V)`,
        which works on each position by itself.  Blocks call `ops.attention(q, k, v, ctx)`.
        Buffers that no checkpoint holds are made by an optional method `reset_buffers(device)`.
        """

    def weight_map(self, config: Any) -> Sequence[WeightRule]:
        """How checkpoint tensors become the module's parameters, and back."""

    def parallel_plan(self, config: Any) -> ParallelPlan:
        """Which parameters are cut by columns, rows or vocabulary under tensor parallelism."""

    def tokenizer(self, path: Path) -> Any:
        """A tokenizer with the transformers interface, read from a folder without running its code."""


@runtime_checkable
class Optimizer(Protocol):
    """Updates parameters, either after the backward pass (`step`) or inside it (`update`).

    A plugin may state `default_lr`, the learning rate of a run whose config has none, and
    `default_lr_clipped`, that of one with `clip_grad_norm`.
    """

    @property
    def in_backward(self) -> bool:
        """True: `update` is called for each gradient, which is freed after it.  False: `step` is called."""

    def passes(self, step: StepBatch) -> list[str]:
        """Forward-backward passes over the step batch: `["update"]`, or `["norm", "update"]` to learn the
        gradient norm in a pass of its own instead of keeping all gradients.

        Before them there may be passes by other names, whose gradients are never clipped: `update` gets each,
        whether or not `in_backward`.  An optional method `loss(name)` gives the loss function of such a pass
        (see `Trainer`'s loss_fn), summed over the target tokens, or None for the ordinary one."""

    def begin_pass(self, name: str, lr: float, loss_scale: float, grad_scale: Any) -> None:
        """Called before the first gradient of a pass is complete.

        The true gradient is `gradient / loss_scale`, clamped to ±clip_grad_value where that is set, times
        `grad_scale` (a float or a 0-d tensor; the factor of norm clipping).  Not called with name "norm"
        for anything but information: in that pass the layout measures and drops the gradients.
        """

    def end_pass(self, name: str) -> None:
        """Called when the pass has ended."""

    def update(self, name: str, parameter: nn.Parameter, gradient: Tensor, finite: Tensor) -> None:
        """(in_backward, and own passes) Use a parameter's complete gradient, summed over micro-batches
        and ranks.  Both are this rank's part where a layout cuts parameters; `ParameterGroup.shard(name)`
        says which part, for statistics and noise over the whole.  `finite` is a 0-d bool tensor on the
        gradient's device: where it is false neither the parameter nor any state may change; select with
        `torch.where`, never ask the host.

        An optional method `update_together(gradients, finite)` is called instead inside the backward pass,
        with the (name, parameter, gradient) of all that are complete at that moment, of a compiled block say,
        and a flag for each, (n,) bool: for an optimizer that has one kernel for all."""

    def step(self, lr: float) -> None:
        """(not in_backward) Update every parameter from its `.grad`, already unscaled and clipped; not called
        where loss or gradients are not finite.

        An optional method `update_all(gradients, finite)` is called instead, after `begin_pass`, with each
        (name, parameter, gradient) as the backward pass left it, which the optimizer frees when it is used;
        all as in `update`.  So gradients need not be copied to be scaled.  Where a property
        `skips_on_device` is true, it is called before the host knows whether they are `finite`."""

    def state_dict(self) -> Mapping[str, Any]:
        """State tensors (or pieces) under flat names `<parameter name>.<state>`; live tensors, not copies.

        One of the shape of its parameter is cut like it; of any other that is cut, `Shard.piece` says how."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict."""


class Layout(Protocol):
    """Where the model lives and how a step runs: one process, or many."""

    model: nn.Module
    optimizer: Optimizer | None
    needs_norm: bool  # the gradient norm must be known before any update (norm clipping, fp16 loss scaling)

    def count_micro_batches(self, rows: int) -> int:
        """(with pp_size above 1) Into how many micro-batches this rank's rows of a step are cut."""

    def prepare(
        self,
        provider: ModelProvider,
        adapters: Sequence[Adapter],
        make_optimizer: Callable[[nn.Module], Optimizer] | None,
    ) -> None:
        """Build, adapt, cut, allocate and load the model, then make the optimizer on final parameters.

        An optional method `check_model(model, provider, adapters)`, called before the data are read, raises
        ConfigError where the sizes do not fit the complete module, adapted and on meta."""

    def train_step(self, step_batch: StepBatch, lr: float) -> dict[str, float]:
        """Every pass, reduction, clipping and update of one step.

        Returns loss (mean over target tokens), grad_norm (before clipping) and finite (1.0 or 0.0)."""

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """(summed loss, number of target tokens) over all ranks, without gradients."""

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Prompt and new tokens, (B, S + new); options as `collie_core.models.generation.generate`."""

    def save(self, folder: Path) -> None:
        """Write model and optimizer tensors into a checkpoint folder; all ranks call it."""

    def state(self) -> Mapping[str, Tensor | Piece]:
        """(for `checkpoint.async_save`) What save writes: live tensors, or this rank's pieces of them."""

    def load(self, folder: Path) -> None:
        """Read them back, in place, whatever the layout that wrote them."""

    def full_tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter and persistent buffer, or of those in `names`, one at a
        time, for export.

        All ranks ask for all of them; the tensors need to be whole on rank 0 alone."""

    def close(self, error: BaseException | None) -> None:
        """Free what prepare took."""


class Adapter(Protocol):
    """Adds a few parameters to a model (LoRA and the like), whose own are then frozen.

    The plugin's entry point is the `peft_type`, in lower case, of the folders that it reads, by an option
    `path`; an option `adapter_name` tells several apart.  A plugin may state `default_lr_factor`: its
    learning rate, where the config has none, over the optimizer's own (of several adapters the least that is
    stated holds), and `virtual_tokens`, a number of tokens (ids -1, -2, ...) before every record; `adapt`
    then gives the module an attribute of this name.
    Optional methods: `lr_scale(name)`, a factor of the learning rate of a new parameter;
    `parallel_plan(plan)`, the model's plan with what the adapter changes.  Linears are changed by
    `add_delta` and embeddings by `adapt_embedding`, so that every layout can cut them; `pack_linear` stores
    a linear's weight packed, frozen, for other adapters to train on top (such an adapter may add nothing).
    """

    @property
    def name(self) -> str:
        """What tells it from the other adapters of a run; a part of file and parameter names."""

    def adapt(self, model: nn.Module) -> None:
        """Add to the structure of the complete module, without values yet; the model's own parameters keep
        their names.  It is on meta, unless the user gave one with weights."""

    def initialise(self, name: str, values: Tensor, shard: Shard) -> None:
        """Fill `values`, this rank's part of the new parameter `name`: a function of seed, name and global
        index, or what `load` read.  `shard` says which part it is.  The model has its weights: the whole of
        one is `run.shards[its name].gathered()`, asked for by all ranks in the same order."""

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the new parameters, whole, by name, in the adapter's library's own layout."""

    def load(self, folder: Path) -> None:
        """Read what save wrote; called before `adapt`.  Raises CheckpointError."""

    def merge(self, model: nn.Module) -> None:
        """Fold the adapter into the weights it adapts.  Raises UserError where that cannot be."""


class Monitor(Protocol):
    """Shows or stores what happens; a monitor that fails is reported once and dropped."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a training step (`loss`, `lr`, ...) or of an evaluation (`perplexity/perplexity`)."""

    def text(self, step: int, key: str, value: str) -> None:
        """A piece of text, such as a generated sample, that a plugin gave to `run.text(key, value)`."""

    def close(self, error: BaseException | None) -> None:
        """The run has ended, by `error` or well."""


# ------------------------------------------------------------ factories, each asked of one selected plugin
@hookspec(firstresult=True)
def collie_model_provider(checkpoint: Any, run: Run | None) -> ModelProvider:  # type: ignore[empty-body]
    """The provider for a checkpoint (`.path: Path | None`, `.config: dict`).  `run` is None outside a run."""


@hookspec(firstresult=True)
def collie_layout(run: Run) -> Layout:  # type: ignore[empty-body]
    """The layout of a run; it opens its process groups here and prepares the model later."""


@hookspec(firstresult=True)
def collie_optimizer(model: nn.Module, layout: Layout, run: Run) -> Optimizer:  # type: ignore[empty-body]
    """The optimizer over the final parameters of `model`; `run.parameter_groups(model)` has the groups."""


@hookspec(firstresult=True)
def collie_adapter(run: Run) -> Adapter:  # type: ignore[empty-body]
    """One adapter, applied in the order of the config."""


@hookspec(firstresult=True)
def collie_monitor(run: Run) -> Monitor:  # type: ignore[empty-body]
    """One monitor; made on rank 0 after the output folder exists."""


# ---------------------------------------------------------------- asked of every selected plugin
@hookspec
def collie_check(run: Run) -> Sequence[str]:  # type: ignore[empty-body]
    """Problems: what this plugin cannot serve in this run; asked before anything is allocated or written.

    One that is a `collie_core.plugin.Refusal` also says what works instead, for `config check --explain`.
    """


@hookspec
def collie_explain(run: Run) -> Mapping[str, str]:  # type: ignore[empty-body]
    """What this plugin does in this run, text by topic, for `config check --explain`."""


@hookspec
def collie_model_built(run: Run, model: nn.Module, training: bool) -> None:
    """The complete module stands, adapters in place, mostly still on meta; nothing cuts or compiles it yet.

    Here a plugin may change how modules compute (`AdaptedLinear.multiply`), but no parameter's name, shape or
    dtype, nor whether it is trained.  Whatever is raised ends the run.  training: false for an evaluation
    alone.  Told twice: before the data are read a module is built that only shows whether all fits.
    """


# ---------------------------------------------------------------- lifecycle, told to every selected plugin
@hookspec
def collie_run_start(run: Run) -> None:
    """Training is about to begin (or to go on, `run.step` steps done)."""


@hookspec
def collie_epoch_start(run: Run, epoch: int) -> None:
    """An epoch begins (counted from 0)."""


@hookspec
def collie_step_start(run: Run, step: int) -> None:
    """Step `step` (counted from 1) begins."""


@hookspec
def collie_backward_end(run: Run, step: int) -> None:
    """All passes of the step are done (for a fused optimizer: the updates too)."""


@hookspec
def collie_step_end(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """The step is done; `run.stop(reason)` here, on any process, ends the run after it.

    `peak_memory_gib` is this process's; what is logged afterwards is the highest of all."""


@hookspec
def collie_epoch_end(run: Run, epoch: int) -> None:
    """An epoch is done: its last step is; not told where a run ends within it."""


@hookspec
def collie_evaluate_start(run: Run, step: int) -> None:
    """An evaluation begins."""


@hookspec
def collie_evaluate_end(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """An evaluation is done; `run.stop(reason)` here, on any process, ends the run."""


@hookspec
def collie_checkpoint_saving(run: Run, step: int) -> None:
    """A checkpoint is about to be written."""


@hookspec
def collie_checkpoint_saved(run: Run, step: int, path: Path) -> None:
    """A checkpoint is whole, at `path`."""


@hookspec
def collie_model_loaded(run: Run, model: nn.Module) -> None:
    """The model has its weights."""


@hookspec
def collie_exported(run: Run, path: Path) -> None:
    """The model was written in Hugging Face layout."""


@hookspec
def collie_run_error(run: Run, error: BaseException) -> None:
    """The run is ending by `error`."""


@hookspec
def collie_run_end(run: Run) -> None:
    """The run has ended, well or not."""
