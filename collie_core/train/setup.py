"""From a Trainer to a Session: every check for users' mistakes, before anything is written."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.config.checks import check_config, processes, product
from collie_core.config.problems import ConfigProblems, Key
from collie_core.errors import ConfigError, PluginError, nearest
from collie_core.registry import Registry, RunPlugins, SelectedPlugin
from collie_core.train.data import open_dataset, open_evaluators, open_reader, required_dataset
from collie_core.train.model import check_model, open_model, without_adapters
from collie_core.train.resume import (
    checkpoint_to_resume,
    is_finished,
    lock_existing,
    lock_new,
    same_data,
    settled,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from collie_core.checkpoint.folder import Checkpoint
    from collie_core.config.schema import CollieConfig, PluginSection
    from collie_core.hookspecs import Layout
    from collie_core.run import Run
    from collie_core.train.session import Session
    from collie_core.train.trainer import Trainer


#: Seconds that a collective may take; processes that died or hang are found much earlier.
_COLLECTIVE_TIMEOUT_S = 1800.0
#: The same where processes wait for one that tokenises or downloads: a week.
_CONTROL_TIMEOUT_S = 7 * 86_400.0


def sections(config: CollieConfig) -> Iterator[tuple[str, Key, PluginSection]]:
    """(kind, key path, section) of every plugin that a config names, but for the model."""
    yield "layout", ("layout",), config.layout
    yield "optimizer", ("optimizer",), config.optimizer
    for kind, key in (("adapter", "adapters"), ("monitor", "monitors"), ("plugin", "plugins")):
        for index, section in enumerate(getattr(config, key)):
            yield kind, (key, index), section


def select_plugins(config: CollieConfig, plugins: RunPlugins) -> None:
    """Load every plugin that the config names and validate its options.

    Raises ConfigProblems with all that cannot be used and all wrong options.
    """
    problems: list[tuple[Key, str]] = []
    for kind, path, section in sections(config):
        core_keys = sorted(type(section).model_fields.keys() - {"name"})
        try:
            plugins.add(kind, section.name, section.options, core_keys)
        except ConfigProblems as found:
            problems += found.below(path).problems
        except PluginError as error:
            problems.append(((*path, "name"), str(error)))
    if config.model.provider is not None:
        try:
            plugins.registry.find("model", config.model.provider, wildcard=False)
        except PluginError as error:
            problems.append((("model", "provider"), str(error)))
    from collie_core.ops.select import check_names
    from collie_core.train.evaluation import EVALUATORS

    names: set[str] = set()
    for index, evaluator in enumerate(config.evaluate.evaluators):
        at: Key = ("evaluate", "evaluators", index)
        name = evaluator.name
        if name not in EVALUATORS:
            known = f"{nearest(name, EVALUATORS)} (known: {', '.join(EVALUATORS)})"
            problems.append(((*at, "name"), f"unknown evaluator {name!r}{known}"))
            continue
        # none has options yet, and figures are known by the evaluator's name
        problems += [((*at, key), f"unknown key: {name} has no options") for key in evaluator.options]
        if name in names:
            problems.append(((*at, "name"), f"{name!r} is there already"))
        names.add(name)
    if problems:
        raise config.problems(ConfigProblems(problems))
    check_names(config.ops.attention, config.ops.cross_entropy)


def check_run(config: CollieConfig) -> list[str]:
    """What `collie config check` does: the config, its plugins and their own checks; returns their names."""
    refuse(checked_plugins(config)[2])
    return [f"{kind} {section.name}" for kind, _, section in sections(config)]


def checked_plugins(
    config: CollieConfig, registry: Registry | None = None
) -> tuple[Run, RunPlugins, list[str]]:
    """The plugins that a config selects, a run to ask them about, and what they cannot serve in it.

    registry: what is installed, where it was looked up before.
    """
    import torch

    from collie_core.run import Run

    check_config(config, product(config))
    plugins = RunPlugins(registry or Registry())
    select_plugins(config, plugins)
    run = Run(config, Path(config.output_dir), torch.device("cpu"))
    return run, plugins, plugins.check(run)


def refuse(problems: list[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def open_training(trainer: Trainer) -> Iterator[Session]:
    """A session ready to train, the output folder locked; closed again at the end.

    One that has nothing left to do (`session.done`) is opened without the model.
    """
    from collie_core.checkpoint.manager import CheckpointManager
    from collie_core.monitors.metrics_file import MetricsFile
    from collie_core.together import from_first
    from collie_core.train.session import Session

    config = trainer.config
    with ExitStack() as stack:
        run, plugins = _new_run(trainer, stack)
        exists = from_first(lambda: lock_existing(run, stack), run.control)
        section = config.checkpoint
        # a group for checkpoints alone, so that saves in the background never cross other messages
        own_group = None if run.control is None else stack.enter_context(_patient_group())
        checkpoints = CheckpointManager(run.output_dir, section.keep, section.verify, own_group)
        checkpoint = checkpoint_to_resume(run, checkpoints)
        run.resolved.update(settled(run, checkpoint))
        without_adapters(run)  # an object says so at once, and a folder when it is opened
        provider = open_model(trainer, run, plugins, stack, checkpoint)
        without_adapters(run)
        refuse(plugins.check(run))
        run.virtual_tokens = _virtual_tokens(plugins.of_kind("adapter"))
        base_lr = _base_lr(run, plugins)
        layout = _open_layout(run, plugins, stack)
        run.model_built = partial(plugins.model_built, run, training=True)
        check_model(run, plugins, layout)
        train_data = required_dataset(trainer, run, provider, "train")
        if checkpoint is not None:
            same_data(config, checkpoint, train_data)
        eval_data = open_dataset(trainer, run, provider, "eval")
        reader = open_reader(run, train_data, layout)
        metrics_file = MetricsFile(run.output_dir / "metrics.jsonl")
        session = Session(
            run=run,
            plugins=plugins,
            provider=provider,
            layout=layout,
            reader=reader,
            evaluators=open_evaluators(run, eval_data),
            base_lr=base_lr,
            checkpoints=checkpoints,
            data_fingerprint=train_data.fingerprint,
            metrics_file=metrics_file,
            position=reader.state(),
            last_evaluation=from_first(lambda: metrics_file.last_evaluation(run.step), run.control),
            saved=run.step,
            done=from_first(lambda: is_finished(run, checkpoint), run.control),
        )
        if config.evaluate.every_steps is not None and not session.evaluators:
            session.warn("evaluate.every_steps evaluates nothing: there is no data.eval")
        if not session.done:
            _prepare(session, checkpoint)
        if not exists:
            from_first(lambda: lock_new(run, stack), run.control)
        yield session


@contextmanager
def open_evaluation(trainer: Trainer) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that runs every evaluator; nothing is written."""
    from collie_core.models.adapters import make_adapters, select_adapters
    from collie_core.train.evaluation import run_evaluators

    with ExitStack() as stack:
        run, plugins = _new_run(trainer, stack)
        provider = open_model(trainer, run, plugins, stack)
        assert run.source is not None
        selected = select_adapters(run.source.adapters, plugins)  # not those that the config would train
        refuse(plugins.check(run))
        # a model object brings its own
        run.virtual_tokens = _virtual_tokens(selected) or getattr(run.model, "virtual_tokens", 0)
        data = required_dataset(trainer, run, provider, "eval")
        layout = _open_layout(run, plugins, stack)
        run.model_built = partial(plugins.model_built, run, training=False)
        layout.prepare(provider, make_adapters(selected, plugins, run), None)
        evaluators = open_evaluators(run, data)
        yield lambda: run_evaluators(evaluators, layout)


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
        run.control = stack.enter_context(_patient_group())
    torch.manual_seed(config.seed + data_rank(config, run.rank))
    return run, plugins


@contextmanager
def _patient_group() -> Iterator[ProcessGroup]:
    """A group of all processes over gloo.  After an error it stays: others may be waiting in it."""
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_CONTROL_TIMEOUT_S))
    yield group
    dist.destroy_process_group(group)


def _open_layout(run: Run, plugins: RunPlugins, stack: ExitStack) -> Layout:
    """The layout, its processes grouped; the model comes later."""
    layout: Layout = plugins.call_one(plugins.of_kind("layout")[0], "collie_layout", run=run)
    stack.callback(layout.close, None)
    return layout


def _prepare(session: Session, checkpoint: Checkpoint | None) -> None:
    """Give the layout its model and optimizer, and put everything where the checkpoint says."""
    from collie_core.checkpoint.rng import restore_rng_of_rank
    from collie_core.models.adapters import make_adapters

    state = None if checkpoint is None else checkpoint.state()
    if state is not None:
        session.position = state["position"]
        session.reader.restore(session.position)
    run, plugins, layout = session.run, session.plugins, session.layout
    optimizer_plugin = plugins.of_kind("optimizer")[0]
    run.resolved["optimizer.lr"] = session.base_lr
    layout.prepare(
        session.provider,
        make_adapters(plugins.of_kind("adapter"), plugins, run),
        lambda model: plugins.call_one(
            optimizer_plugin, "collie_optimizer", model=model, layout=layout, run=run
        ),
    )
    if checkpoint is not None:
        layout.load(checkpoint.path)
    plugins.broadcast("collie_model_loaded", run=run, model=layout.model)
    if state is not None:
        restore_rng_of_rank(state, run.config, run.rank)


def _base_lr(run: Run, plugins: RunPlugins) -> float:
    """The config's learning rate, or the optimizer's own, times the least factor that an adapter states."""
    if run.config.optimizer.lr is not None:
        return run.config.optimizer.lr
    optimizer = plugins.of_kind("optimizer")[0].instance
    default: float | None = getattr(optimizer, "default_lr", None)
    if run.config.optimizer.clip_grad_norm is not None:
        default = getattr(optimizer, "default_lr_clipped", default)
    if default is None:
        message = f"is required: optimizer {run.config.optimizer.name!r} has no default learning rate"
        raise run.config.problems(ConfigProblems([(("optimizer", "lr"), message)]))
    stated = (getattr(plugin.instance, "default_lr_factor", None) for plugin in plugins.of_kind("adapter"))
    return default * min((factor for factor in stated if factor is not None), default=1.0)


def _virtual_tokens(adapters: list[SelectedPlugin]) -> int:
    """What the adapters put before every record."""
    return sum(getattr(adapter.instance, "virtual_tokens", 0) for adapter in adapters)
