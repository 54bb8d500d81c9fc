"""Does a class keep the plugin contract?  Checked without making an instance."""

from __future__ import annotations

import dataclasses
import inspect
from types import FunctionType

import pluggy

from collie_core import hookspecs
from collie_core.errors import nearest
from collie_core.hookspecs import API_VERSION, REQUIRED_HOOK

#: hook -> its arguments
HOOKS: dict[str, list[str]] = {
    name: list(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name.startswith("collie_") and inspect.isfunction(spec)
}


def contract_problem(kind: str, plugin: object) -> str:
    """The first thing wrong with the object that an entry point names, or ""."""
    if not isinstance(plugin, type):
        return f"its entry point names {plugin!r}, which is no class"
    return (
        _api_problem(plugin)
        or _options_problem(plugin)
        or hook_problem(plugin)
        or _required_hook_problem(kind, plugin)
    )


def _api_problem(plugin: type) -> str:
    stated = getattr(plugin, "collie_api", None)
    versions = stated if isinstance(stated, tuple) else (stated,)
    if stated is None:
        return f"class {plugin.__name__} states no plugin API; write `collie_api = {API_VERSION}` into it"
    if API_VERSION in versions:
        return ""
    told = " or ".join(map(str, versions))
    older = all(isinstance(version, int) and version < API_VERSION for version in versions)
    cure = "upgrade it" if older else "upgrade collie-core"
    return f"it was written for plugin API {told}, but this core speaks {API_VERSION}; {cure}"


def _options_problem(plugin: type) -> str:
    options = getattr(plugin, "Options", None)
    if options is None:
        return ""
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        return f"{plugin.__name__}.Options is no dataclass"
    if any(field.name == "name" for field in dataclasses.fields(options)):
        return f"{plugin.__name__}.Options has a field `name`, the key that chooses the plugin; rename it"
    return ""


def hook_problem(target: object) -> str:
    """The first unknown hook, unknown argument or unmarked hook of a class or object, or ""."""
    marks = hook_marks(target)
    for name, mark in marks.items():
        hook = mark["specname"] or name
        if hook not in HOOKS:
            if mark["optionalhook"]:
                continue
            return f"it implements an unknown hook {hook!r}{nearest(hook, HOOKS)}"
        if mark["hookwrapper"]:
            return f"its {hook} is marked hookwrapper=True, pluggy's old way; write wrapper=True"
        for argument in _arguments(target, name):
            if argument not in HOOKS[hook]:
                hint = nearest(argument, HOOKS[hook])
                known = ", ".join(HOOKS[hook])
                return f"its {hook} takes an unknown argument {argument!r}{hint} (known: {known})"
    for hook in HOOKS:
        if hook not in marks and inspect.isroutine(_member(target, hook)):
            return f"its {hook} is not marked with @hookimpl"
    return ""


def hook_marks(target: object) -> dict[str, pluggy.HookimplOpts]:
    """Methods marked `@hookimpl`: attribute name -> what the mark says."""
    manager = pluggy.PluginManager("collie")
    found = {}
    for name in dir(target):
        if inspect.isroutine(_member(target, name)):
            mark = manager.parse_hookimpl_opts(target, name)
            if mark is not None:
                found[name] = mark
    return found


def _member(target: object, name: str) -> object:
    """A method, without running properties."""
    static = inspect.getattr_static(target, name, None)
    return None if isinstance(static, property) else getattr(target, name, None)


def _arguments(target: object, name: str) -> list[str]:
    """The arguments that a hook implementation wants, without `self`."""
    function = getattr(target, name)
    wanted = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    unbound = isinstance(target, type) and isinstance(inspect.getattr_static(target, name), FunctionType)
    return wanted[1:] if unbound else wanted


def _required_hook_problem(kind: str, plugin: type) -> str:
    required = REQUIRED_HOOK.get(kind)
    marks = hook_marks(plugin)
    answering = {mark["specname"] or name for name, mark in marks.items() if not mark["wrapper"]}
    if required is None or required in answering:
        return ""
    return f"class {plugin.__name__} does not implement {required}, which every {kind} must"
