"""The layout: weights placed, DeepSpeed's engine around them, and a step that is the run's own."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.errors import ConfigError
from collie_core.launch.world import open_group_of_one
from collie_core.models.generation import GenerationOptions, generate_with
from collie_core.ops import Context, KVCache, select_ops
from collie_methods.deepspeed_layout import ds_config, states
from collie_methods.deepspeed_layout.environment import import_deepspeed
from collie_methods.deepspeed_layout.placement import Placed, Root, place, place_partitioned

if TYPE_CHECKING:
    from collie_core.data.batch import MicroBatch, StepBatch
    from collie_core.hookspecs import Adapter, ModelProvider, Optimizer
    from collie_core.optimizers.shadowed import ShadowedOptimizer
    from collie_core.run import Run
    from collie_methods.deepspeed_layout.plugin import DeepSpeedLayoutPlugin


class DeepSpeedLayout:
    """`model` exists after `prepare`; the optimizer is DeepSpeed's, inside `engine`.

    engine is None where nothing is trained and ZeRO 3 has nothing to gather.
    """

    model: nn.Module
    placed: Placed
    needs_norm = False  # DeepSpeed finds the norm itself

    def __init__(self, run: Run, options: DeepSpeedLayoutPlugin.Options) -> None:
        self.run, self.options = run, options
        self.zero_stage, self.dp_size = options.zero_stage, run.config.dp_size
        self.optimizer: Optimizer | None = None
        self.engine: Any = None
        self._deepspeed = import_deepspeed(run.device)
        self._opened = not dist.is_initialized()
        if self._opened:  # DeepSpeed wants a process group even for one process
            open_group_of_one(run.device)
        self._deepspeed.init_distributed(verbose=False)

    # ------------------------------------------------------------ life
    def prepare(
        self,
        provider: ModelProvider,
        adapters: Sequence[Adapter],
        make_optimizer: Callable[[nn.Module], Optimizer] | None,
    ) -> None:
        """Place the weights, make torch's optimizer of what the plugin says, and give both to DeepSpeed.

        Raises CheckpointError where the weights do not fit the model, ConfigError for an optimizer that is
        not torch's, or a ds_config that DeepSpeed refuses.
        """
        run, config = self.run, self.run.config
        self.partitioned, self.trains = self.zero_stage == 3, make_optimizer is not None
        ops = select_ops(
            attention=config.ops.attention,
            # ZeRO 3 gathers the head's weight for its own forward and no longer
            cross_entropy="plain" if self.partitioned else config.ops.cross_entropy,
            use_flash=config.use_flash,
            device=run.device,
            dtype=getattr(torch, config.model.dtype),
            deterministic=config.train.deterministic,
        )
        run.resolved["ops"] = ops.describe()
        run.resolved["compile"] = False
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        settings = ds_config.effective(config, self.options)
        run.resolved["layout.ds_config"] = settings
        try:
            if self.partitioned:
                self.placed = place_partitioned(run, provider, adapters, ops, self._deepspeed, settings)
            else:
                self.placed = place(run, provider, adapters, ops)
            self.model, self.root = self.placed.model, Root(self.placed.stage)
            self.placed.stage.resolve(self.trains, self._most)
            run.shards = self.placed.shards
            optimizer = self._torch_optimizer(make_optimizer(self.model)) if make_optimizer else None
            if self.trains or self.partitioned:
                with redirect_stdout(io.StringIO()):  # stdout belongs to results
                    self.engine, *_ = self._deepspeed.initialize(
                        model=self.root, optimizer=optimizer, config=settings, dist_init_required=False
                    )
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"layout.ds_config: DeepSpeed refuses {where}: {first['msg']}") from None

    def _torch_optimizer(self, made: Any) -> torch.optim.Optimizer:
        """The same rule over the model's own parameters: ZeRO itself keeps fp32 copies of their parts."""
        config = self.run.config
        if not hasattr(made, "torch_class"):
            raise ConfigError(
                f"optimizer {config.optimizer.name}: it is no torch optimizer, which DeepSpeed needs; "
                f"use layout: {{name: native, zero_stage: {self.zero_stage}}}"
            )
        recipe: ShadowedOptimizer = made
        groups = [
            {
                "params": list(group.parameters.values()),
                "lr_scale": group.lr_scale,
                "weight_decay": group.weight_decay,
            }
            for group in recipe.groups
        ]
        options = dict(recipe.options)
        if ds_config.wants_ds_cpu_optimizer(self.options) and _can_compile():
            on_host = self._on_host(recipe.torch_class, options)
            if on_host is not None:
                return on_host(groups)
        return recipe.torch_class(groups, **options)

    def _on_host(
        self, torch_class: type[torch.optim.Optimizer], options: Mapping[str, Any]
    ) -> Callable[[Any], torch.optim.Optimizer] | None:
        """DeepSpeed's own Adam for host memory, which it compiles when it is first used; None where the
        optimizer is another, or has an option that it lacks."""
        if torch_class not in (torch.optim.Adam, torch.optim.AdamW):
            return None
        known = {"betas", "eps"}
        if any(value for key, value in options.items() if key not in known and key != "fused"):
            return None
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        given = {key: options[key] for key in known & options.keys()}
        decoupled = torch_class is torch.optim.AdamW
        return lambda groups: DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **given)

    def close(self, error: BaseException | None) -> None:
        """Remove DeepSpeed's hooks, and the process group that one process opened."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
        if self._opened and dist.is_initialized():
            from deepspeed import comm

            comm.destroy_process_group()
        if self.run.config.train.deterministic:
            torch.use_deterministic_algorithms(False)

    def count_micro_batches(self, rows: int) -> int:
        """Of micro_batch_size rows."""
        return -(-rows // self.run.config.train.micro_batch_size)

    # ------------------------------------------------------------ a step
    def train_step(self, step_batch: StepBatch, lr: float) -> dict[str, float]:
        """Forward and backward of every micro-batch, and DeepSpeed's update; see `Layout.train_step`.

        DeepSpeed averages gradients over dp, so the loss is multiplied by dp: the sum over all ranks is left.
        """
        engine, batches = self.engine, step_batch.micro_batches
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        summed = torch.zeros((), device=self.run.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            engine.set_gradient_accumulation_boundary(last)
            loss = engine("forward", batch)
            summed += loss.detach()
            scaled = loss * (self.dp_size / step_batch.target_tokens)
            if last:
                dist.all_reduce(summed)
                # a loss that is not finite on one rank makes gradients that are not, on all: no rank updates
                scaled = scaled * torch.where(torch.isfinite(summed), 1.0, torch.nan)
            engine.backward(scaled, scale_wrt_gas=False)
        norm, applied = self._update()
        return {
            "loss": float(summed) / step_batch.target_tokens,
            "grad_norm": norm,
            "finite": float(applied),
        }

    def _update(self) -> tuple[float, bool]:
        """(gradient norm before clipping, whether the step was applied).

        DeepSpeed itself skips a step that is not finite, but for ZeRO 0.
        """
        engine = self.engine
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.placed.parameters.values() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            applied = bool(torch.isfinite(torch.tensor(norm)))
            if applied:
                engine.step()
            else:
                engine.zero_grad()
            return norm, applied
        engine.step()
        return float(engine.get_global_grad_norm()), engine.was_step_applied()

    # ------------------------------------------------------------ evaluation and generation
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """(summed loss, target tokens) over all ranks."""
        self.root.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.run.device), 0
        with torch.no_grad():
            for batch in batches:
                total += self.root("forward", batch, None, False)
                tokens += batch.target_tokens
        figures = torch.stack([total, torch.full_like(total, tokens)])
        dist.all_reduce(figures)
        summed, count = figures.tolist()
        return summed, int(count)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """See `collie_core.models.generation.generate`; all ranks give the same prompts."""
        self.root.eval()
        chosen = GenerationOptions(**options)
        if self.dp_size > 1 and chosen.do_sample and chosen.seed is None:
            seed = torch.randint(2**62, (1,), device=self.run.device)
            dist.broadcast(seed, 0)
            chosen = GenerationOptions(**{**options, "seed": int(seed)})

        def next_logits(ids: Tensor, ctx: Context, cache: KVCache) -> Tensor:
            logits: Tensor = self.root("next_logits", ids, ctx, cache)
            return logits

        ids, blocks = input_ids.to(self.run.device), list(self.placed.stage.blocks)
        return generate_with(next_logits, self.model, ids, attention_mask, chosen, blocks)

    # ------------------------------------------------------------ tensors out and in
    def save(self, folder: Path) -> None:
        """Write `model.*`, `optimizer.*` and `layout.master.*` tensors."""
        from collie_core.checkpoint.store import save_tensors

        save_tensors(self.state(), folder, process_group=self.run.control)

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint holds of this rank."""
        return states.state_of(self)

    def load(self, folder: Path) -> None:
        """Read them back, whatever the layout that wrote them."""
        states.load_state(self, folder)

    def full_tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer; whole on rank 0, empty on the others, which ask along."""
        return states.full_tensors(self, names)

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """In it the parameter is whole; a change by rank 0 holds on all ranks afterwards."""
        if not self.partitioned:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _most(self, number: int) -> int:
        """The most of what all ranks say."""
        common = torch.tensor(number, device=self.run.device)
        dist.all_reduce(common, dist.ReduceOp.MAX)
        return int(common)


def _can_compile() -> bool:
    """What DeepSpeed's extensions need is there: a C++ compiler and ninja."""
    return shutil.which("g++") is not None and importlib.util.find_spec("ninja") is not None
