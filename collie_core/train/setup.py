"""From a Trainer to a Session: every check for users' mistakes, before anything is written."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from collie_core.config.checks import check_config, processes, resume_differences
from collie_core.config.problems import ConfigProblems, Key
from collie_core.errors import ConfigError, UserError, nearest
from collie_core.registry import Registry, RunPlugins, SelectedPlugin

if TYPE_CHECKING:
    from collie_core.checkpoint.manager import Checkpoint, CheckpointManager
    from collie_core.config.schema import CollieConfig, PluginSection
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.hookspecs import Layout, ModelProvider
    from collie_core.run import Run
    from collie_core.train.session import Session
    from collie_core.train.trainer import Trainer


#: Seconds that a collective may take; processes that died or hang are found much earlier.
_COLLECTIVE_TIMEOUT_S = 1800.0


def sections(config: CollieConfig) -> Iterator[tuple[str, Key, PluginSection]]:
    """(kind, key path, section) of every plugin that a config names, but for the model."""
    yield "layout", ("layout",), config.layout
    yield "optimizer", ("optimizer",), config.optimizer
    for kind, key in (("adapter", "adapters"), ("monitor", "monitors"), ("plugin", "plugins")):
        for index, section in enumerate(getattr(config, key)):
            yield kind, (key, index), section


def select_plugins(config: CollieConfig, plugins: RunPlugins) -> None:
    """Load every plugin that the config names and validate its options.

    Raises PluginError for one that cannot be used, ConfigProblems for wrong options.
    """
    for kind, path, section in sections(config):
        try:
            plugins.add(kind, section.name, section.options)
        except ConfigProblems as found:
            raise config.problems(found.below(path)) from None
    from collie_core.train.evaluation import EVALUATORS

    for index, evaluator in enumerate(config.evaluate.evaluators):
        if evaluator.name not in EVALUATORS:
            message = f"unknown evaluator {evaluator.name!r}{nearest(evaluator.name, EVALUATORS)}"
            raise config.problems(ConfigProblems([(("evaluate", "evaluators", index, "name"), message)]))


def check_run(config: CollieConfig) -> list[str]:
    """What `collie config check` does: the config, its plugins and their own checks; returns their names."""
    refuse(checked_plugins(config)[2])
    return [f"{kind} {section.name}" for kind, _, section in sections(config)]


def checked_plugins(config: CollieConfig) -> tuple[Run, RunPlugins, list[str]]:
    """The plugins that a config selects, a run to ask them about, and what they cannot serve in it."""
    import torch

    from collie_core.run import Run

    check_config(config, config.dp_size * config.tp_size * config.pp_size)
    plugins = RunPlugins(Registry())
    select_plugins(config, plugins)
    run = Run(config, Path(config.output_dir), torch.device("cpu"))
    return run, plugins, plugins.check(run)


def refuse(problems: list[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


def finished(session: Session) -> bool:
    """True where a resumed run had already done its last step and exported its model."""
    from collie_core.train.output import final_folder

    run = session.run
    return run.step >= run.total_steps and final_folder(run).is_dir()


@contextmanager
def open_training(trainer: Trainer) -> Iterator[Session]:
    """A session ready to train, the output folder locked; closed again at the end."""
    from collie_core.checkpoint.manager import CheckpointManager
    from collie_core.checkpoint.rng import restore_rng
    from collie_core.data.build import build_reader
    from collie_core.files import OutputLock
    from collie_core.layouts.grid import data_rank
    from collie_core.monitors.metrics_file import MetricsFile
    from collie_core.together import from_first
    from collie_core.train.session import Session

    config = trainer.config
    with ExitStack() as stack:
        run, plugins = _new_run(trainer, stack)
        folder = run.output_dir

        def lock_existing() -> bool:
            """Hold the folder of an earlier run; a new one is made when all else is known to be well."""
            if not folder.is_dir() or not any(folder.iterdir()):
                return False
            _must_be_a_run(folder)
            stack.enter_context(OutputLock(folder))
            return True

        def lock_new() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(OutputLock(folder))

        exists = from_first(lock_existing, run.control)
        checkpoints = CheckpointManager(
            folder, keep=config.checkpoint.keep, verify=config.checkpoint.verify, group=_own_group(run)
        )
        checkpoint = _checkpoint_to_resume(run, checkpoints)
        provider = _open_model(trainer, run, plugins)
        _without_adapters(run)
        refuse(plugins.check(run))
        run.virtual_tokens = _virtual_tokens(plugins.of_kind("adapter"))
        train_data = _dataset(trainer, run, provider, "train", stack)
        eval_data = _dataset(trainer, run, provider, "eval", stack)
        if train_data is None:
            raise config.problems(
                ConfigProblems([(("data", "train"), "is required to train: a file or folder of records")])
            )
        layout = _open_layout(run, plugins, stack)
        reader = build_reader(
            train_data,
            config,
            dp_rank=data_rank(config, run.rank),
            pad_token_id=run.pad_token_id,
            count_micro_batches=layout.count_micro_batches if config.pp_size > 1 else None,
        )
        run.total_steps = reader.total_steps(config.train.epochs)
        if config.train.max_steps is not None:
            run.total_steps = min(run.total_steps, config.train.max_steps)
        base_lr = _prepare(run, plugins, provider, layout, checkpoint)
        session = Session(
            run=run,
            plugins=plugins,
            provider=provider,
            layout=layout,
            reader=reader,
            evaluators=_evaluators(run, eval_data),
            base_lr=base_lr,
            checkpoints=checkpoints,
            data_fingerprint=train_data.fingerprint,
            metrics_file=MetricsFile(folder / "metrics.jsonl"),
        )
        if checkpoint is not None:
            state = checkpoint.state()
            _same_data(config, state["data"], train_data)
            reader.restore(state["position"])
            session.position = state["position"]
            if len(state["rng"]) == run.world_size:
                restore_rng(state["rng"][run.rank])
        if not exists:
            from_first(lock_new, run.control)
        yield session


@contextmanager
def open_evaluation(trainer: Trainer) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that runs every evaluator; nothing is written."""
    from collie_core.models.adapters import select_adapters

    config = trainer.config
    with ExitStack() as stack:
        run, plugins = _new_run(trainer, stack)
        provider = _open_model(trainer, run, plugins)
        assert run.source is not None
        selected = select_adapters(run.source.adapters, plugins)  # not those that the config would train
        refuse(plugins.check(run))
        run.virtual_tokens = _virtual_tokens(selected)
        data = _dataset(trainer, run, provider, "eval", stack)
        if data is None:
            raise config.problems(
                ConfigProblems([(("data", "eval"), "is required to evaluate: a file or folder of records")])
            )
        layout = _open_layout(run, plugins, stack)
        adapters = [plugins.call_one(plugin, "collie_adapter", run=run) for plugin in selected]
        layout.prepare(provider, adapters, None)
        evaluators = _evaluators(run, data)

        def evaluate() -> dict[str, float]:
            return {
                f"{name}/{figure}": value
                for name, evaluator in evaluators.items()
                for figure, value in evaluator(layout).items()
            }

        yield evaluate


def _new_run(trainer: Trainer, stack: ExitStack) -> tuple[Run, RunPlugins]:
    """The run and its selected plugins, after the checks that need neither model nor data.

    With several processes they have met when it returns.
    """
    import torch

    from collie_core.launch.world import (
        close_process_group,
        current_world,
        local_device,
        open_process_group,
    )
    from collie_core.layouts.grid import data_rank
    from collie_core.run import Run

    config = trainer.config
    check_config(config, processes())
    plugins = RunPlugins(Registry())
    select_plugins(config, plugins)
    for index, callback in enumerate(trainer.callbacks):
        plugins.register_object(callback, f"callback:{index}")
    world = current_world()
    device = local_device(world)
    if config.train.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run = Run(
        config,
        Path(config.output_dir),
        device,
        rank=world.rank,
        world_size=world.size,
        loss_fn=trainer.loss_fn,
        model=trainer.model,
    )
    if world.size > 1:
        if not torch.distributed.is_initialized():  # it stays for a later run of the same process
            open_process_group(world, device, _COLLECTIVE_TIMEOUT_S)
            atexit.register(close_process_group)
        stack.push(lambda kind, error, trace: close_process_group() if error is not None else None)
        run.control = torch.distributed.new_group(backend="gloo")
    torch.manual_seed(config.seed + data_rank(config, run.rank))
    return run, plugins


def _own_group(run: Run) -> Any:
    """A group for checkpoints alone, so that saves in the background never cross other messages."""
    import torch.distributed as dist

    return None if run.control is None else dist.new_group(backend="gloo")


def _open_model(trainer: Trainer, run: Run, plugins: RunPlugins) -> ModelProvider:
    """Find the checkpoint and its provider; read its config and tokenizer."""
    from collie_core.models.provider import select_provider

    section = run.config.model
    origin = getattr(trainer.model, "origin", None)
    without_weights = trainer.model is not None and next(trainer.model.parameters()).is_meta
    given = origin.path if origin is not None and without_weights else None
    selected = select_provider(
        given or section.path, provider=section.provider, revision=section.revision, plugins=plugins, run=run
    )
    run.source = selected
    run.tokenizer = trainer.tokenizer or selected.provider.tokenizer(selected.path)
    return selected.provider


def _dataset(
    trainer: Trainer,
    run: Run,
    provider: ModelProvider,
    split: Literal["train", "eval"],
    stack: ExitStack,
) -> TokenizedDataset | None:
    """The tokenised records of a split, or None where the config has none.

    On each machine one process reads and tokenises them; the others map its arrays.
    """
    from collie_core.data.build import build_dataset
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.together import from_first_on_node

    given = trainer.train_dataset if split == "train" else trainer.eval_dataset
    source: Any = given if given is not None else getattr(run.config.data, split)
    if source is None:
        return None

    def build() -> TokenizedDataset:
        return build_dataset(
            source,
            run.tokenizer,
            run.config.data,
            split=split,
            provider_template=provider.template,
            virtual_tokens=run.virtual_tokens,
            progress=run.first,
        )

    if run.world_size == 1:
        return build()

    def build_for_all() -> Path:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="collie-data-")))
        build().save(folder)
        return folder

    return TokenizedDataset.open(from_first_on_node(build_for_all, run.control))


def _evaluators(run: Run, data: TokenizedDataset | None) -> dict[str, Any]:
    from collie_core.data.reader import EvaluationBatches
    from collie_core.layouts.grid import data_rank
    from collie_core.train.evaluation import make_evaluators

    if data is None:
        return {}
    rows = run.config.evaluate.micro_batch_size or run.config.train.micro_batch_size
    batches = EvaluationBatches(
        data,
        micro_batch_size=rows,
        dp_rank=data_rank(run.config, run.rank),
        dp_size=run.config.dp_size,
        pad_token_id=run.pad_token_id,
    )
    return make_evaluators(run.config, batches)


def _open_layout(run: Run, plugins: RunPlugins, stack: ExitStack) -> Layout:
    """The layout, its processes grouped; the model comes later."""
    layout: Layout = plugins.call_one(plugins.of_kind("layout")[0], "collie_layout", run=run)
    stack.callback(layout.close, None)
    return layout


def _prepare(
    run: Run, plugins: RunPlugins, provider: ModelProvider, layout: Layout, checkpoint: Checkpoint | None
) -> float:
    """Give the layout its model and optimizer; returns the base learning rate."""
    optimizer_plugin = plugins.of_kind("optimizer")[0]
    base_lr = run.resolved["optimizer.lr"] = _base_lr(run, plugins)
    adapters = [plugins.call_one(plugin, "collie_adapter", run=run) for plugin in plugins.of_kind("adapter")]
    layout.prepare(
        provider,
        adapters,
        lambda model: plugins.call_one(
            optimizer_plugin, "collie_optimizer", model=model, layout=layout, run=run
        ),
    )
    if checkpoint is not None:
        layout.load(checkpoint.path)
    plugins.broadcast("collie_model_loaded", run=run, model=layout.model)
    return base_lr


def _base_lr(run: Run, plugins: RunPlugins) -> float:
    """The config's learning rate, or the optimizer's own, times the factor of the adapters (the least)."""
    if run.config.optimizer.lr is not None:
        return run.config.optimizer.lr
    default: float | None = getattr(plugins.of_kind("optimizer")[0].instance, "default_lr", None)
    if default is None:
        message = f"is required: optimizer {run.config.optimizer.name!r} has no default learning rate"
        raise run.config.problems(ConfigProblems([(("optimizer", "lr"), message)]))
    adapters = [plugin.instance for plugin in plugins.of_kind("adapter")]
    return default * min((getattr(adapter, "default_lr_factor", 1.0) for adapter in adapters), default=1.0)


def _virtual_tokens(adapters: list[SelectedPlugin]) -> int:
    """What the adapters put before every record."""
    return sum(getattr(adapter.instance, "virtual_tokens", 0) for adapter in adapters)


def _without_adapters(run: Run) -> None:
    """Refuse to train on top of adapters that are not merged."""
    assert run.source is not None
    if run.source.adapters or getattr(run.model, "adapters", None):
        message = (
            "has adapters: name its base model here and the adapter in adapters ({name: ..., path: folder}), "
            "or merge it first (collie export --merge, model.merge_adapters())"
        )
        raise run.config.problems(ConfigProblems([(("model", "path"), message)]))


def _same_data(config: CollieConfig, saved: str, data: TokenizedDataset) -> None:
    """Refuse to go on with other records: the position in the data would mean nothing."""
    if saved != data.fingerprint:
        message = "its records or their tokens have changed since the checkpoint; use another output_dir"
        raise config.problems(ConfigProblems([(("data", "train"), message)]))


def _must_be_a_run(folder: Path) -> None:
    if not (folder / ".lock").exists() and not (folder / "run.json").exists():
        raise UserError(f"output_dir {folder}: is not empty and no run's folder; choose another one")


def _checkpoint_to_resume(run: Run, checkpoints: CheckpointManager) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` asks for; the run then stands at its step.

    The first process looks and verifies for all.
    """
    from collie_core.together import from_first

    found = from_first(lambda: _find_checkpoint(run, checkpoints), run.control)
    if found is None:
        return None
    state = found.state()
    run.step = state["step"]
    run.resolved.update(state["resolved"])
    return found


def _find_checkpoint(run: Run, checkpoints: CheckpointManager) -> Checkpoint | None:
    config, mode = run.config, run.config.checkpoint.resume
    if mode == "never":
        if run.output_dir.is_dir() and any(run.output_dir.iterdir()):
            message = (
                f"never, but output_dir {run.output_dir} is not empty; choose another one, or resume: auto"
            )
            raise config.problems(ConfigProblems([(("checkpoint", "resume"), message)]))
        return None
    found = checkpoints.latest() if mode == "auto" else checkpoints.open(Path(mode))
    if found is not None:
        differences = resume_differences(found.state()["config"], config)
        if differences:
            raise config.problems(ConfigProblems(differences))
    return found
