"""`Trainer`: a config, and optionally a model, data, callbacks or a loss as objects, to a trained model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import ConfigError
from collie_core.launch.failure import plainly, translated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.config.schema import CollieConfig
    from collie_core.train.session import Session

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, the last evaluation, where the model (or adapter) is, what stopped it."""

    step: int
    evaluation: dict[str, float]
    output_dir: Path
    model: Path | None
    stopped_by: str | None
    signal: signal.Signals | None


class Trainer:
    """Trains the model of a config on its data.

    model: a module from `from_pretrained`, used instead of loading `config.model.path`.
    train_dataset, eval_dataset: records (mappings as in a data file), used instead of `config.data`.
    callbacks: objects with lifecycle methods marked `hookimpl`.
    loss_fn: arguments by name (logits, labels, input_ids, hidden_states, model, batch); returns the loss
        summed over the target tokens, or one loss a token; logits[:, t] predict labels[:, t].
    """

    def __init__(
        self,
        config: CollieConfig,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        train_dataset: Records | None = None,
        eval_dataset: Records | None = None,
        callbacks: Sequence[object] = (),
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        from collie_core.config.schema import CollieConfig

        if not isinstance(config, CollieConfig):
            kind = type(config).__name__
            raise ConfigError(f"Trainer: expected a CollieConfig (from_yaml reads a file), got {kind}")
        if model is not None and not callable(getattr(model, "named_parameters", None)):
            raise ConfigError(f"Trainer(model=...): expected a module, got {type(model).__name__}")
        if model is not None and next(iter(model.parameters()), None) is None:
            raise ConfigError("Trainer(model=...): the module has no parameters")
        if isinstance(tokenizer, str | PathLike):
            raise ConfigError(
                "Trainer(tokenizer=...): expected a tokenizer, as AutoTokenizer reads one, got a path"
            )
        if not isinstance(callbacks, Sequence):
            kind = type(callbacks).__name__
            raise ConfigError(f"Trainer(callbacks=...): expected a list of callbacks, got {kind}")
        for callback in callbacks:
            if isinstance(callback, type):
                raise ConfigError(f"Trainer(callbacks=...): {callback.__name__} is a class; give an instance")
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.callbacks = tuple(callbacks)
        self.loss_fn = loss_fn

    def train(self) -> TrainResult:
        """Train, evaluate, save and export.

        Raises a UserError before anything is written where the config, data, checkpoint or a plugin cannot be
        used; RunFailed or OutOfMemory where the run could not go on.  SIGTERM and SIGINT end it well.
        """
        from collie_core.launch.world import current_world
        from collie_core.train.loop import train_loop
        from collie_core.train.setup import open_training
        from collie_core.train.signals import StopSignals

        signals = StopSignals(graceful=False, say=current_world().rank == 0)
        with plainly(_TRAINING_ADVICE), signals, open_training(self) as session:
            if session.done:
                session.note(f"{session.run.output_dir} has already done its {session.run.step} steps")
                return self._result(session)
            try:
                signals.graceful = True
                session.start()
                train_loop(session, signals)
                session.settle()
                signals.graceful = False
                if session.agree(signals).signal is None:
                    session.finish()
                session.close(None)
            except BaseException as error:
                failure = translated(error, _TRAINING_ADVICE)
                session.fail(failure)
                if failure is error:
                    raise
                raise failure from error
            return self._result(session)

    def evaluate(self) -> dict[str, float]:
        """Every evaluator on the evaluation data; trains and writes nothing."""
        from collie_core.train.setup import open_evaluation

        with plainly(_EVALUATION_ADVICE), open_evaluation(self) as evaluation:
            return evaluation()

    def _result(self, session: Session) -> TrainResult:
        from collie_core.train.output import final_folder

        run, stop, model = session.run, session.stop, final_folder(session.run)
        return TrainResult(
            run.step,
            session.last_evaluation,
            run.output_dir,
            model if model.is_dir() else None,
            run.stop_reason if stop.asked else None,
            stop.signal,
        )


_TRAINING_ADVICE = (
    "Lower train.micro_batch_size and raise train.gradient_accumulation_steps in step, or set "
    "train.activation_checkpointing: full; a run that has begun goes on so. A lower data.max_length needs "
    "another output_dir"
)
_EVALUATION_ADVICE = "Lower evaluate.micro_batch_size"
