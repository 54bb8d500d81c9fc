"""The native layout: the plain module on one process, with nothing wrapped around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.data.batch import MicroBatch, StepBatch
    from collie_core.hookspecs import Adapter, Layout, ModelProvider, Optimizer
    from collie_core.run import Run


class NativeLayoutPlugin:
    """PyTorch's own engine; one process runs the plain module."""

    collie_api = 1

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Keys of `layout:`."""

        zero_stage: Literal[0, 1, 2, 3] = 0

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def collie_check(self, run: Run) -> list[str]:
        """Refuse what needs more than one process."""
        sizes = {name: getattr(run.config, name) for name in ("dp_size", "tp_size", "pp_size")}
        found = [
            f"{name} {size}: the native layout runs on one process so far, set {name}: 1"
            for name, size in sizes.items()
            if size > 1
        ]
        if run.config.checkpoint.async_save:
            found.append(
                "checkpoint.async_save: the native layout saves in the foreground so far, set it to false"
            )
        return found

    @hookimpl
    def collie_layout(self, run: Run) -> Layout:
        """The layout of this run."""
        return NativeLayout(run)


class NativeLayout:
    """One process.  `model` and `optimizer` exist after `prepare`."""

    model: nn.Module
    optimizer: Optimizer | None

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = None
        self.needs_norm = False

    # ------------------------------------------------------------ life
    def prepare(
        self,
        provider: ModelProvider,
        adapters: Sequence[Adapter],
        make_optimizer: Callable[[nn.Module], Optimizer] | None,
    ) -> None:
        """Build on meta, adapt, allocate and load, then make the optimizer.

        Raises CheckpointError where the weights do not fit the model.
        """
        import torch

        from collie_core.layouts.forward import Forward
        from collie_core.layouts.gradients import GradientFlow
        from collie_core.layouts.loss_scale import LossScale
        from collie_core.layouts.materialise import materialise
        from collie_core.ops import select_ops

        run, config = self.run, self.run.config
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        ops = select_ops(
            attention=config.ops.attention,
            cross_entropy=config.ops.cross_entropy,
            use_flash=config.use_flash,
            device=run.device,
        )
        self.model = materialise(run, provider, adapters, ops)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.forward = Forward(self.model, ops, run)
        run.resolved["ops"] = ops.describe()
        if make_optimizer is None:
            return
        self.loss_scale = LossScale(next(iter(self.parameters.values())).dtype)
        self.needs_norm = config.optimizer.clip_grad_norm is not None or self.loss_scale.enabled
        self.forward.resolve(training=True)
        self.gradients = GradientFlow(self.parameters)
        self.optimizer = make_optimizer(self.model)

    def close(self, error: BaseException | None) -> None:
        """Remove the hooks, and give torch its freedom back."""
        import torch

        if self.optimizer is not None:
            self.gradients.close()
            self.optimizer = None
        if self.run.config.train.deterministic:
            torch.use_deterministic_algorithms(False)

    # ------------------------------------------------------------ a step
    def train_step(self, step_batch: StepBatch, lr: float) -> dict[str, float]:
        """All passes over the step batch, clipping and the update; see `Layout.train_step`."""
        import torch

        from collie_core.layouts.random_state import RandomState

        assert self.optimizer is not None
        self.model.train()
        fused = self.optimizer.in_backward
        names = self.optimizer.passes(step_batch) if fused else ["update"]
        random_state = RandomState(self.run.device) if len(names) > 1 else None
        norm: Tensor | None = None
        for name in names:
            if random_state is not None:
                random_state.rewind()  # every pass draws the dropout masks of the first
            loss, norm = self._pass(name, step_batch, lr, norm)
        assert norm is not None
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if not fused:
            self._step(lr, norm, finite)
        self.gradients.drop()
        # the one place where the step waits for the device
        figures = torch.stack([loss, norm, torch.isfinite(loss).float(), finite.float()]).tolist()
        return self._figures(*figures)

    def _pass(self, name: str, batch: StepBatch, lr: float, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """One forward and backward over the step batch; (mean loss, gradient norm), both on the device.

        norm: the norm found by an earlier pass, or None.
        """
        import torch

        assert self.optimizer is not None
        optimizer, scale = self.optimizer, self.loss_scale.value
        kept = not optimizer.in_backward or name == "update" and self.needs_norm and norm is None
        losses: list[Tensor] = []
        self.gradients.arm("accumulate")
        for index, micro_batch in enumerate(batch.micro_batches):
            loss = self.forward.summed_loss(micro_batch)
            losses.append(loss.detach())
            if index == len(batch.micro_batches) - 1:  # the gradients of this backward are complete
                total = torch.stack(losses).sum() / batch.target_tokens
                if name == "norm":
                    self.gradients.arm("measure")
                elif kept:
                    self.gradients.arm("keep")
                else:
                    finite = torch.isfinite(total) & (torch.isfinite(norm) if norm is not None else True)
                    optimizer.begin_pass(name, lr, scale, self._clip_factor(norm))
                    self.gradients.arm("update", finite, optimizer.update)
            (loss * (scale / batch.target_tokens)).backward()
        measured = self.gradients.norm().to(total.device) / scale
        if kept and optimizer.in_backward:
            optimizer.begin_pass(name, lr, scale, self._clip_factor(measured))
            finite = torch.isfinite(total) & torch.isfinite(measured)
            for parameter_name, parameter, gradient in self.gradients.kept():
                optimizer.update(parameter_name, parameter, gradient, finite)
                parameter.grad = None
        if optimizer.in_backward and name != "norm":
            optimizer.end_pass(name)
        return total, measured

    def _clip_factor(self, norm: Tensor | None) -> Tensor | float:
        """min(1, C / (norm + 1e-6)), or 1 where nothing is clipped."""
        limit = self.run.config.optimizer.clip_grad_norm
        if limit is None or norm is None:
            return 1.0
        return (limit / (norm + 1e-6)).clamp(max=1.0)

    def _step(self, lr: float, norm: Tensor, finite: Tensor) -> None:
        """Unscale, clip and update for an optimizer that runs after the backward pass."""
        assert self.optimizer is not None
        if not bool(finite):
            return
        limit = self.run.config.optimizer.clip_grad_value
        factor = self._clip_factor(norm)
        for _, _, gradient in self.gradients.kept():
            if self.loss_scale.enabled:
                gradient.div_(self.loss_scale.value)
            if limit is not None:
                gradient.clamp_(-limit, limit)
            if isinstance(factor, float):
                continue
            gradient.mul_(factor)
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
        """(summed loss, target tokens)."""
        import torch

        self.model.eval()
        total = torch.zeros((), dtype=torch.float64)
        tokens = 0
        with torch.no_grad():
            for batch in batches:
                total += self.forward.summed_loss(batch, custom=False).double().cpu()
                tokens += batch.target_tokens
        return float(total), tokens

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """See `collie_core.models.generation.generate`."""
        from collie_core.models.generation import generate

        self.model.eval()
        return generate(self.model, input_ids.to(self.run.device), **options)

    # ------------------------------------------------------------ tensors out and in
    def save(self, folder: Path) -> None:
        """Write `model.*`, `optimizer.*` and `layout.*` tensors."""
        from collie_core.checkpoint.store import save_tensors

        save_tensors(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Read model, optimizer and loss scale back from a checkpoint."""
        from collie_core.checkpoint.store import load_tensors, read_metadata, stream_tensors

        load_tensors({f"model.{name}": tensor for name, tensor in self.full_tensors()}, folder)
        if self.optimizer is None:
            return
        stored = list(read_metadata(folder).tensors)
        self.loss_scale.load_state_dict(_below("layout.", stream_tensors(folder, ["layout.loss_scale"])))
        names = [name for name in stored if name.startswith("optimizer.")]
        self.optimizer.load_state_dict(_below("optimizer.", stream_tensors(folder, names)))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer; a tied one once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()
        persistent = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                yield name, buffer

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in self.full_tensors()}
        if self.optimizer is not None:
            state |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
            state |= {f"layout.{name}": tensor for name, tensor in self.loss_scale.state_dict().items()}
        return state


def _below(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by their names without `prefix`; copies, since a stream may share memory with its file."""
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors}
