"""The plugins that one run selected, and the ways in which the core asks and tells them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from collie_core import hookspecs
from collie_core.errors import CollieError, PluginError, Refusal
from collie_core.registry.contract import hook_marks, hook_problem
from collie_core.registry.discovery import PluginInfo
from collie_core.registry.registry import Registry, describe_error, make_instance

if TYPE_CHECKING:
    from torch import nn

    from collie_core.run import Run

#: a failure of one of these ends the run, since its result depends on them; any other plugin is dropped
ESSENTIAL = ("model", "layout", "optimizer", "adapter")


class _Hooks:
    """The hook methods of one instance: what pluggy registers.

    An instance may compare equal to another, be unhashable, or have properties that fail; this may not.
    """

    def __init__(self, instance: object) -> None:
        for name in hook_marks(instance):
            setattr(self, name, getattr(instance, name))


@dataclass(frozen=True, eq=False)
class SelectedPlugin:
    """One plugin instance of a run.  `key` is `kind:index:name`; info is None for a user's callback."""

    kind: str
    key: str
    instance: Any
    info: PluginInfo | None
    hooks: _Hooks

    @property
    def label(self) -> str:
        """For messages: kind, name and where it comes from."""
        if self.info is None:
            return f"callback {type(self.instance).__qualname__}"
        return f"{self.kind} {self.info.name!r} ({self.info.distribution} {self.info.version})"


class RunPlugins:
    """A plugin manager of one run.  Nothing in it is shared with another run."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._manager = pluggy.PluginManager("collie")
        self._manager.add_hookspecs(hookspecs)
        self._selected: list[SelectedPlugin] = []
        self._dropped: set[str] = set()

    def add(
        self,
        kind: str,
        name: str,
        options: Mapping[str, Any] | None = None,
        core_keys: Sequence[str] = (),
    ) -> SelectedPlugin:
        """Select the plugin that `name` means; the same one may be selected several times.

        core_keys: keys beside the options that the core reads itself, told where an option is unknown.
        Raises PluginError where it cannot be used, ConfigProblems for wrong options.
        """
        loaded = self.registry.load(kind, name)
        key = f"{kind}:{len(self.of_kind(kind))}:{loaded.info.name}"
        made = make_instance(loaded, options or {}, core_keys)
        return self._register(kind, key, made, loaded.info)

    def register_object(self, instance: object, name: str) -> SelectedPlugin:
        """Register a user's callback: any object with methods marked `@hookimpl`.  Raises PluginError."""
        problem = hook_problem(instance)
        if not problem and not hook_marks(instance):
            problem = "none of its methods is marked with @hookimpl"
        if problem:
            raise PluginError(f"callback {type(instance).__qualname__} cannot be used: {problem}")
        return self._register("callback", name, instance, None)

    def _register(self, kind: str, key: str, instance: object, info: PluginInfo | None) -> SelectedPlugin:
        plugin = SelectedPlugin(kind, key, instance, info, _Hooks(instance))
        try:
            self._manager.register(plugin.hooks, name=key)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{plugin.label} cannot be used: {' '.join(str(error).split())}") from None
        self._selected.append(plugin)
        return plugin

    def of_kind(self, kind: str) -> list[SelectedPlugin]:
        """The selected plugins of a kind, in the order of the config."""
        return [plugin for plugin in self._selected if plugin.kind == kind]

    def call_one(self, plugin: SelectedPlugin, hook: str, **arguments: Any) -> Any:
        """Ask one plugin's factory hook; plugins of kind `plugin` and callbacks may wrap it.

        Raises PluginError where it returns nothing; what it raises itself is noted with its origin.
        """
        with _origin_noted(plugin):
            made = self._caller(plugin, hook)(**arguments)
        if made is None:
            raise PluginError(f"{plugin.label}: its {hook} returned nothing")
        return made

    def check(self, run: Run) -> list[str]:
        """What the selected plugins cannot serve in this run, each problem with the plugin's name.

        A plugin that fails in its check ends the command, whatever its kind.
        """
        problems = []
        for plugin, implementation in self._implementations("collie_check"):
            if implementation.wrapper:
                continue
            with _origin_noted(plugin):
                answers = self._caller(plugin, "collie_check")(run=run)
            for answer in answers:
                texts = [answer] if isinstance(answer, str) else answer
                if not isinstance(texts, list | tuple):
                    raise PluginError(f"{plugin.label}: collie_check returned {answer!r}, no list of texts")
                problems += [
                    text.of(plugin.label) if isinstance(text, Refusal) else f"{plugin.label}: {text}"
                    for text in texts
                ]
        return list(dict.fromkeys(problems))  # two entries of one plugin may tell the same

    def explain(self, run: Run) -> dict[str, Mapping[str, str]]:
        """What the selected plugins say of this run, by the plugin's label."""
        said: dict[str, Mapping[str, str]] = {}
        for plugin, implementation in self._implementations("collie_explain"):
            if implementation.wrapper:
                continue
            with _origin_noted(plugin):
                answers = self._caller(plugin, "collie_explain")(run=run)
            for answer in answers:
                said[plugin.label] = {**said.get(plugin.label, {}), **answer}
        return said

    def model_built(self, run: Run, model: nn.Module, training: bool) -> None:
        """Let every selected plugin change how the complete module computes; what one raises goes on.

        Raises PluginError for a plugin that changes a parameter.
        """
        before = _parameters(model)
        for plugin, implementation in self._implementations("collie_model_built"):
            if implementation.wrapper:
                continue
            with _origin_noted(plugin):
                caller = self._caller(plugin, "collie_model_built")
                caller(run=run, model=model, training=training)
            after = _parameters(model)
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    was, now = (_said(found.get(name)) for found in (before, after))
                    raise PluginError(
                        f"{plugin.label}: its collie_model_built may change how modules compute, but {name} "
                        f"was {was} and is {now}"
                    )

    def broadcast(self, hook: str, **arguments: Any) -> None:
        """Tell every selected plugin of a lifecycle event, in the order of the config.

        A monitor, plugin or callback that fails is reported once on stderr and told nothing more.
        `tryfirst` and `trylast` are respected; a wrapper surrounds all others.
        """
        wrapping: list[tuple[SelectedPlugin, Generator[None, Any, Any]]] = []
        for plugin, implementation in self._implementations(hook):
            with self._isolated(plugin, hook):
                result = _call(implementation, arguments)
                if implementation.wrapper:
                    next(result)
                    wrapping.append((plugin, result))
        for plugin, generator in reversed(wrapping):
            with self._isolated(plugin, hook):
                _finish(generator)

    def provenance(self) -> list[dict[str, str]]:
        """Kind, name, distribution, version and file of every selected plugin."""
        return [
            {
                "kind": plugin.kind,
                "name": plugin.info.name if plugin.info else type(plugin.instance).__qualname__,
                "distribution": plugin.info.distribution if plugin.info else "",
                "version": plugin.info.version if plugin.info else "",
                "file": _file(plugin.instance),
            }
            for plugin in self._selected
        ]

    def _implementations(self, hook: str) -> Iterator[tuple[SelectedPlugin, pluggy.HookImpl]]:
        """Wrappers, then tryfirst, then the order of the config, then trylast."""
        by_key = {plugin.key: plugin for plugin in self._selected}
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        in_order = sorted(caller.get_hookimpls(), key=lambda i: (not i.wrapper, i.trylast - i.tryfirst))
        for implementation in in_order:
            if implementation.plugin_name not in self._dropped:
                yield by_key[implementation.plugin_name], implementation

    def _caller(self, plugin: SelectedPlugin, hook: str) -> pluggy.HookCaller:
        """Asks `plugin` alone, wrapped by the plugins of kind `plugin` and callbacks that wrap this hook."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        wrapping = {i.plugin_name for i in caller.get_hookimpls() if i.wrapper}
        others = [
            other.hooks
            for other in self._selected
            if other is not plugin and not (other.key in wrapping and other.kind in ("plugin", "callback"))
        ]
        return self._manager.subset_hook_caller(hook, others)

    @contextmanager
    def _isolated(self, plugin: SelectedPlugin, hook: str) -> Iterator[None]:
        if plugin.kind in ESSENTIAL:
            with _origin_noted(plugin):
                yield
            return
        try:
            yield
        except (Exception, SystemExit) as error:
            self._dropped.add(plugin.key)
            print(
                f"warning: {plugin.label} failed in {hook} and is told nothing more: {describe_error(error)}",
                file=sys.stderr,
                flush=True,
            )


def _parameters(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and whether it is trained of every parameter, a tied one under all its names."""
    return {
        name: (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _said(parameter: tuple[Any, ...] | None) -> str:
    if parameter is None:
        return "absent"
    shape, dtype, trained = parameter
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} {'trained' if trained else 'frozen'}"


def _call(implementation: pluggy.HookImpl, arguments: Mapping[str, Any]) -> Any:
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _finish(generator: Generator[None, Any, Any]) -> None:
    try:
        generator.send(None)
    except StopIteration:
        return
    raise RuntimeError("a wrapper must yield once")


@contextmanager
def _origin_noted(plugin: SelectedPlugin) -> Iterator[None]:
    """Note the plugin on an error that it raises; turn a missing library into a PluginError."""
    try:
        yield
    except ImportError as error:
        raise PluginError(f"{plugin.label} cannot be used: {describe_error(error)}") from error
    except CollieError:
        raise
    except Exception as error:
        error.add_note(f"raised by {plugin.label}")
        raise


def _file(instance: object) -> str:
    try:
        return inspect.getfile(type(instance))
    except (TypeError, OSError):  # a class made in an interactive session
        return ""
