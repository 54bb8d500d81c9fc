"""The training loop: one straight line from a step batch to update, figures, checkpoint and evaluation."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from collie_core.errors import RunFailed, listed
from collie_core.schedules import learning_rate_factor

if TYPE_CHECKING:
    from collie_core.data.batch import StepBatch
    from collie_core.train.session import Session
    from collie_core.train.signals import StopSignals


def train_loop(session: Session, signals: StopSignals) -> None:
    """Train from `run.step` to `run.total_steps`, or until the processes agree to stop (`session.stop`).

    What one process alone knows, a signal or a `run.stop`, changes nothing before all have agreed on it.
    Raises RunFailed on a non-finite loss or gradient under `on_nan: stop`.
    """
    run, config, layout, plugins = session.run, session.run.config, session.layout, session.plugins
    epoch: int | None = None
    plugins.broadcast("collie_run_start", run=run)
    for batch in session.reader.steps(run.total_steps):
        if batch.epoch != epoch:
            epoch = batch.epoch
            plugins.broadcast("collie_epoch_start", run=run, epoch=epoch)

        # ---------------------------------------------------------------- the step
        plugins.broadcast("collie_step_start", run=run, step=batch.step)
        started = time.perf_counter()
        lr = session.base_lr * learning_rate_factor(config.schedule, batch.step, run.total_steps)
        figures = layout.train_step(batch, lr)
        seconds = time.perf_counter() - started
        plugins.broadcast("collie_backward_end", run=run, step=batch.step)
        if not figures["finite"]:
            _not_finite(session, batch, figures)
        run.step = batch.step
        session.position = session.reader.state()
        session.note_choices()

        # ---------------------------------------------------------------- its end, and its figures
        metrics = _metrics(batch, lr, figures, seconds, session.peak_memory_gib())
        plugins.broadcast("collie_step_end", run=run, step=run.step, metrics=metrics)
        if session.position["epoch"] > batch.epoch:
            plugins.broadcast("collie_epoch_end", run=run, epoch=batch.epoch)
        stop = session.agree(signals)
        session.log(run.step, {**metrics, "peak_memory_gib": stop.memory})

        # ---------------------------------------------------------------- checkpoint and evaluation
        ends = bool(stop) or run.step >= run.total_steps
        if ends or _due(config.checkpoint.every_steps, run.step):
            session.save()
        # who sends a signal waits
        if stop.signal is None and (ends or _due(config.evaluate.every_steps, run.step)):
            session.evaluate()
            if session.agree(signals):
                ends = True
                session.save()
        if ends:
            break


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
    """Name the records of a step that is not finite; under `on_nan: stop` save what was before, and end."""
    from collie_core.together import gather

    own = [origin for micro in batch.micro_batches for row in micro.records for origin in row]
    records = list(dict.fromkeys(origin for one in gather(own, session.run.control) for origin in one))
    what = "loss" if not math.isfinite(figures["loss"]) else "gradient"
    message = (
        f"step {batch.step}: the {what} is not finite (loss {figures['loss']}, gradient norm "
        f"{figures['grad_norm']}); records: {listed(records, 8)}"
    )
    optimizer = session.layout.optimizer
    # an update in the backward pass knows its own gradient alone, where the norm is not found before
    partly = (
        optimizer is not None
        and optimizer.in_backward
        and math.isfinite(figures["loss"])
        and not session.layout.needs_norm
    )
    if session.run.config.train.on_nan == "skip":
        how = "only parameters whose gradient is finite were updated" if partly else "the step was skipped"
        return session.warn(f"{message}; {how}")
    if partly:
        saved = "nothing is saved, since parameters whose gradient is finite were updated already"
    elif session.run.step:
        session.save()
        saved = f"the state after step {session.run.step} is saved"
    else:
        saved = "no step was done before"
    raise RunFailed(
        f"{message}; {saved}. Go on with train.on_nan: skip, or begin anew with a lower learning rate or "
        "clipped gradients"
    )
