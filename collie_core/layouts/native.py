"""The native layout: PyTorch's own engine on one process, with nothing wrapped around it, or on many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import hookimpl
from collie_core.layouts.options import NativeOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.data.batch import MicroBatch, StepBatch
    from collie_core.hookspecs import Adapter, Layout, ModelProvider, Optimizer
    from collie_core.layouts.build import Placed
    from collie_core.layouts.stage import Stage
    from collie_core.run import Run


class NativeLayoutPlugin:
    """PyTorch's own engine, on one process or as dp x tp x pp with ZeRO."""

    collie_api = 1

    Options = NativeOptions

    def __init__(self, options: NativeOptions) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """What the sizes and options cannot do together."""
        from collie_core.layouts.rules import refusals

        return list(refusals(run.config, self.options))

    @hookimpl
    def collie_explain(self, run: Run) -> Mapping[str, str]:
        """What each rank holds."""
        from collie_core.layouts.explain import held

        return held(run.config, self.options)

    @hookimpl
    def collie_layout(self, run: Run) -> Layout:
        """The layout of this run."""
        return NativeLayout(run, self.options)


class NativeLayout:
    """`model` and `optimizer` exist after `prepare`; each rank has its part of them."""

    model: nn.Module
    optimizer: Optimizer | None

    def __init__(self, run: Run, options: NativeOptions | None = None) -> None:
        from collie_core.layouts.grid import Grid

        self.run, self.options = run, options or NativeOptions()
        self.optimizer = None
        self.needs_norm = False
        self.grid = Grid(run, self.options.shards_parameters(run.config.dp_size))

    # ------------------------------------------------------------ life
    def prepare(
        self,
        provider: ModelProvider,
        adapters: Sequence[Adapter],
        make_optimizer: Callable[[nn.Module], Optimizer] | None,
    ) -> None:
        """Build on meta, adapt, cut, allocate and load, then make the optimizer.

        Raises CheckpointError where the weights do not fit the model.
        """
        import torch

        from collie_core.layouts.gradients import GradientFlow
        from collie_core.layouts.loss_scale import LossScale

        run, config = self.run, self.run.config
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        self.placed = self._place(provider, adapters, make_optimizer is not None)
        self.model, self.stages = self.placed.model, self.placed.stages
        run.shards = self.placed.shards
        self.pipeline = self._pipeline()
        if make_optimizer is None:
            return
        self._modules = [module for stage in self.stages for module in stage.modules()]
        trainable = self.placed.trainable
        self.loss_scale = LossScale(next(iter(self.placed.parameters.values())).dtype)
        self.needs_norm = config.optimizer.clip_grad_norm is not None or self.loss_scale.enabled
        self.gradients = GradientFlow(
            trainable,
            {name: run.shards[name] for name in trainable},
            self.grid.world,
            hooked=self.options.offload == "none",
            together=self.placed.zero or any(stage.compiled for stage in self.stages),
            device=run.device if self.options.offload == "none" else torch.device("cpu"),
        )
        self.optimizer = make_optimizer(self.model)

    def check_model(self, model: nn.Module, provider: ModelProvider, adapters: Sequence[Adapter]) -> None:
        """Refuse sizes that the complete module does not fit; see `Layout.check_model`."""
        if self.grid.world.group is not None:
            from collie_core.layouts.distribute import check_sizes

            check_sizes(model, self.run, provider, adapters, self.grid, self.options)

    def _place(self, provider: ModelProvider, adapters: Sequence[Adapter], training: bool) -> Placed:
        import torch

        from collie_core.layouts.build import place_whole
        from collie_core.ops import select_ops

        run, config = self.run, self.run.config
        ops = select_ops(
            attention=config.ops.attention,
            cross_entropy=config.ops.cross_entropy,
            use_flash=config.use_flash,
            device=run.device,
            dtype=getattr(torch, config.model.dtype),
            deterministic=config.train.deterministic,
        )
        run.resolved["ops"] = ops.describe()
        if self.grid.world.group is not None:
            from collie_core.layouts.distribute import place_parts

            return place_parts(run, provider, adapters, ops, self.grid, self.options, training)
        placed = place_whole(run, provider, adapters, ops)
        placed.stages[0].resolve(training)
        return placed

    def _pipeline(self) -> Any:
        from collie_core.layouts.pipeline import Pipeline

        if self.grid.pp.size == 1:
            return None
        return Pipeline(self.grid, self.stages, self.placed.width, self.placed.dtype)

    def close(self, error: BaseException | None) -> None:
        """Remove the hooks and compiled graphs, give back the process groups, give torch its freedom back."""
        import torch

        if error is None:  # else other ranks may still wait in one
            self.grid.close()
        if self.optimizer is not None:
            self.gradients.close()
            self.optimizer = None
        if self.run.config.train.deterministic:
            torch.use_deterministic_algorithms(False)
        if self.run.resolved.get("compile"):  # of a function eight are kept, and later runs would have none
            torch.compiler.reset()

    def count_micro_batches(self, rows: int) -> int:
        """Pieces of a rank's `rows` of a step; only as many as it has rows are made."""
        size = self.run.config.train.micro_batch_size
        return self.options.micro_batches(rows, size, self.grid.pp.size)

    # ------------------------------------------------------------ a step
    def train_step(self, step_batch: StepBatch, lr: float) -> dict[str, float]:
        """All passes over the step batch, clipping and the update; see `Layout.train_step`."""
        import torch

        from collie_core.layouts.random_state import RandomState

        assert self.optimizer is not None
        self.placed.read_from = None
        if not all(module.training for module in self._modules):  # telling hundreds takes a millisecond
            for stage in self.stages:
                stage.train()
        names = self.optimizer.passes(step_batch)
        if not self._in_hooks:  # all gradients are kept anyway: no pass of its own is needed for the norm
            names = [name for name in names if name != "norm"]
        random_state = RandomState(self.run.device) if len(names) > 1 else None
        norm: Tensor | None = None
        for name in names:
            if random_state is not None:
                random_state.rewind()  # every pass draws the dropout masks of the first
            loss, measured = self._pass(name, step_batch, lr, norm)
            norm = measured if name in ("norm", "update") else None
        assert norm is not None
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        follows = not self.optimizer.in_backward
        unasked = follows and getattr(self.optimizer, "skips_on_device", False)
        if unasked:
            self._step(lr, norm, finite)
        # the one place where the step waits for the device
        figures = torch.stack([loss, norm, torch.isfinite(loss).float(), finite.float()]).tolist()
        if follows and not unasked and figures[-1]:
            self._step(lr, norm, finite)
        self.gradients.drop()
        return self._figures(*figures)

    def _pass(self, name: str, batch: StepBatch, lr: float, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """One forward and backward over the step batch; (mean loss, gradient norm), both on the device.

        norm: the norm found by an earlier pass, or None.
        """
        import torch

        assert self.optimizer is not None
        optimizer, scale = self.optimizer, self.loss_scale.value
        own = name not in ("norm", "update")  # a pass that only the optimizer knows
        updates = own or (optimizer.in_backward and name == "update")
        self._take_loss(name if own else None)
        in_hooks = self._in_hooks and (updates or name == "norm")
        kept = not in_hooks or (name == "update" and self.needs_norm and norm is None)
        factor = scale / batch.target_tokens
        total: Tensor | None = None
        if self.pipeline is not None:
            total = self._pipelined(name, batch, factor)
        else:
            losses: list[Tensor] = []
            self.gradients.arm("accumulate")
            for index, micro_batch in enumerate(batch.micro_batches):
                last = index == len(batch.micro_batches) - 1
                self._reduce_on(self.stages[0], last)
                loss = self.stages[0](micro_batch)
                losses.append(loss.detach())
                if last:  # the gradients of this backward are complete
                    if name == "norm":
                        self.gradients.arm("measure")
                    elif kept:
                        self.gradients.arm("keep")
                    else:
                        total = self._mean_loss(torch.stack(losses).sum(), batch)
                        finite = torch.isfinite(total) & (torch.isfinite(norm) if norm is not None else True)
                        optimizer.begin_pass(name, lr, scale, self._clip_factor(norm))
                        self.gradients.arm("update", finite, optimizer)
                (loss * factor).backward()
                if not last and self.options.offload == "cpu":
                    self.gradients.collect()
            self.gradients.flush()
            if total is None:  # no update waits for it, and so the backward pass does not
                total = self._mean_loss(torch.stack(losses).sum(), batch)
        if self.options.offload == "cpu":
            total = total.cpu()  # where the updates are
        measured = self.gradients.norm().to(total.device) / scale
        if kept and updates:
            optimizer.begin_pass(name, lr, scale, self._clip_factor(None if own else measured))
            self._update_kept(torch.isfinite(total) & torch.isfinite(measured))
        if updates:
            optimizer.end_pass(name)
        return total, measured

    @property
    def _in_hooks(self) -> bool:
        """Whether gradients can be used one by one, while the backward pass goes on."""
        return self.pipeline is None and self.options.offload == "none"

    def _take_loss(self, name: str | None) -> None:
        """The loss of one of the optimizer's own passes, or the run's."""
        loss_of = getattr(self.optimizer, "loss", None) if name is not None else None
        for stage in self.stages:
            stage.loss_fn = self.run.loss_fn if loss_of is None else loss_of(name)

    def _pipelined(self, name: str, batch: StepBatch, factor: float) -> Tensor:
        """The pass through the pipeline; all gradients of this rank's stages are then complete and kept."""
        self.gradients.arm("accumulate")
        for stage in self.stages:
            self._reduce_on(stage, False)
        total = self.pipeline.run(
            self.options.pp_schedule,
            batch.micro_batches,
            lambda loss: loss * factor,
            lambda stage: self._reduce_on(stage, True),
        )
        self.gradients.arm("measure" if name == "norm" else "keep")
        self.gradients.flush()
        return self._mean_loss(total, batch)

    def _reduce_on(self, stage: Stage, last: bool) -> None:
        """Whether ZeRO sums the next gradients over ranks; stage 1 does so at the last micro-batch alone.

        Stages 1 and 2 have whole weights until then, which are not gathered for each micro-batch anew.
        """
        if not self.placed.zero:
            return
        if self.options.zero_stage == 1 or self.pipeline is not None:
            stage.set_requires_gradient_sync(last)  # type: ignore[operator]
        if self.options.zero_stage in (1, 2):
            stage.set_reshard_after_backward(last)  # type: ignore[operator]

    def _mean_loss(self, summed: Tensor, batch: StepBatch) -> Tensor:
        """The loss of the step over all data-parallel ranks, known to all ranks."""
        if not self.grid.last:
            summed.zero_()
        return self.grid.pp.sum(self.grid.dp.sum(summed)) / batch.target_tokens

    def _update_kept(self, finite: Tensor) -> None:
        assert self.optimizer is not None
        for name, parameter, gradient in self.gradients.kept():
            self.optimizer.update(name, parameter, gradient, finite)
            parameter.grad = None

    def _clip_factor(self, norm: Tensor | None) -> Tensor | float:
        """min(1, C / (norm + 1e-6)), or 1 where nothing is clipped."""
        limit = self.run.config.optimizer.clip_grad_norm
        if limit is None or norm is None:
            return 1.0
        return (limit / (norm + 1e-6)).clamp(max=1.0)

    def _step(self, lr: float, norm: Tensor, finite: Tensor) -> None:
        """Unscale, clip and update for an optimizer that runs after the backward pass."""
        from collie_core.optimizers.gradients import scaled_gradient

        assert self.optimizer is not None
        update_all = getattr(self.optimizer, "update_all", None)
        if update_all is not None:
            self.optimizer.begin_pass("update", lr, self.loss_scale.value, self._clip_factor(norm))
            update_all(self.gradients.kept(), finite)
            return
        limit, factor = self.run.config.optimizer.clip_grad_value, self._clip_factor(norm)
        if self.loss_scale.enabled or limit is not None or not isinstance(factor, float):
            for _, parameter, gradient in self.gradients.kept():
                parameter.grad = scaled_gradient(gradient, self.loss_scale.value, factor, limit)
        self.optimizer.step(lr)

    def _figures(self, loss: float, norm: float, loss_finite: float, finite: float) -> dict[str, float]:
        """Move the loss scale; an fp16 overflow is no failure while the scale can fall."""
        figures = {"loss": loss, "grad_norm": norm, "finite": finite}
        if self.loss_scale.enabled:
            figures["loss_scale"] = self.loss_scale.value
            if finite:
                self.loss_scale.succeeded()
            elif loss_finite and self.loss_scale.overflowed():
                figures["finite"] = 1.0
                figures["skipped"] = 1.0
        return figures

    # ------------------------------------------------------------ evaluation and generation
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """(summed loss, target tokens) over all ranks."""
        import torch

        for stage in self.stages:
            stage.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.run.device), 0
        with torch.no_grad():
            for batch in batches:
                if self.pipeline is not None:
                    total += self.pipeline.evaluate(batch)
                else:
                    total += self.stages[0](batch, custom=False)
                tokens += batch.target_tokens * self.grid.last
        figures = torch.stack([total, torch.full_like(total, tokens)])
        summed, count = self.grid.pp.sum(self.grid.dp.sum(figures)).tolist()
        return summed, int(count)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """See `collie_core.models.generation.generate`; all ranks give the same prompts."""
        from collie_core.layouts.generate import generate

        for stage in self.stages:
            stage.eval()
        return generate(self, input_ids.to(self.run.device), **options)

    # ------------------------------------------------------------ tensors out and in
    def save(self, folder: Path) -> None:
        """Write `model.*`, `optimizer.*` and `layout.*` tensors."""
        from collie_core.checkpoint.store import save_tensors

        save_tensors(self.state(), folder, process_group=self.grid.control)

    def load(self, folder: Path) -> None:
        """Read model, optimizer and loss scale back from a checkpoint written under any layout."""
        from collie_core.layouts.state import load_state

        load_state(self, folder)

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint holds of this rank: live tensors, and pieces of those that are cut."""
        from collie_core.layouts.state import state_of

        return state_of(self)

    def full_tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer (of `names`), a tied one once.  Whole on rank 0, empty on
        the others, which must ask along."""
        from collie_core.layouts.state import full_tensors

        return full_tensors(self, names)
