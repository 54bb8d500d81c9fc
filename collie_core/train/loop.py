"""The training loop: one straight line from a step batch to update, figures, evaluation and checkpoint."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from collie_core.errors import RunFailed
from collie_core.schedules import learning_rate_factor

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch
    from collie_core.train.session import Session
    from collie_core.train.signals import StopSignals


def train_loop(session: Session, signals: StopSignals) -> None:
    """Train from `run.step` to `run.total_steps`, or until the run is stopped.

    Raises RunFailed on a non-finite loss or gradient under `on_nan: stop`.
    """
    run, config, layout, plugins = session.run, session.run.config, session.layout, session.plugins
    epoch: int | None = None
    plugins.broadcast("collie_run_start", run=run)
    for batch in session.reader:
        if run.step >= run.total_steps:
            break
        if batch.epoch != epoch:
            if epoch is not None:
                plugins.broadcast("collie_epoch_end", run=run, epoch=epoch)
            epoch = batch.epoch
            plugins.broadcast("collie_epoch_start", run=run, epoch=epoch)

        # ---------------------------------------------------------------- the step
        plugins.broadcast("collie_step_start", run=run, step=batch.step)
        started = time.perf_counter()
        lr = session.base_lr * learning_rate_factor(config.schedule, batch.step, run.total_steps)
        figures = layout.train_step(batch, lr)
        plugins.broadcast("collie_backward_end", run=run, step=batch.step)
        run.step = batch.step
        session.position = session.reader.state()
        if not figures["finite"]:
            _not_finite(session, batch, figures)
        memory = session.agree(signals)

        # ---------------------------------------------------------------- its figures
        metrics = _metrics(batch, lr, figures, time.perf_counter() - started, memory)
        session.log(run.step, metrics)
        plugins.broadcast("collie_step_end", run=run, step=run.step, metrics=metrics)

        # ---------------------------------------------------------------- evaluation and checkpoint
        last = run.step >= run.total_steps
        stopping = signals.received is not None or run.stop_reason is not None
        if _due(config.evaluate.every_steps, run.step) or last or run.stop_reason is not None:
            session.evaluate()
        if _due(config.checkpoint.every_steps, run.step) or stopping or last:
            session.save()
        if stopping:
            break
    if epoch is not None:
        plugins.broadcast("collie_epoch_end", run=run, epoch=epoch)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _metrics(
    batch: StepBatch, lr: float, figures: dict[str, float], seconds: float, memory: float
) -> dict[str, float]:
    """The line of `metrics.jsonl` for a step; tokens count no padding, seconds cover the step alone."""
    return {
        "step": batch.step,
        "epoch": batch.epoch,
        "loss": figures["loss"],
        "lr": lr,
        "grad_norm": figures["grad_norm"],
        "tokens": batch.tokens,
        "tokens_per_second": batch.tokens / seconds,
        "peak_memory_gib": memory,
        "step_time": seconds,
        **{name: value for name, value in figures.items() if name not in ("loss", "grad_norm", "finite")},
    }


def _not_finite(session: Session, batch: StepBatch, figures: dict[str, float]) -> None:
    """Name the records of a step that was skipped; end the run unless `on_nan: skip`."""
    from collie_core.together import gather

    own = [origin for micro in batch.micro_batches for row in micro.records for origin in row]
    records = list(dict.fromkeys(origin for one in gather(own, session.run.control) for origin in one))
    shown = ", ".join(records[:8]) + (f" and {len(records) - 8} more" if len(records) > 8 else "")
    what = "loss" if not math.isfinite(figures["loss"]) else "gradient"
    message = (
        f"step {batch.step}: the {what} is not finite (loss {figures['loss']}, gradient norm "
        f"{figures['grad_norm']}); records: {shown}"
    )
    if session.run.config.train.on_nan == "stop":
        raise RunFailed(f"{message}. Lower the learning rate, clip gradients, or set train.on_nan: skip")
    session.warn(f"{message}; the step was skipped")
