"""How a model of transformers is put together, found by running it once on the meta device.

Its decoder is a stack: embedding, layers, and what follows them.  Where the run shows anything else (layers
that do not follow one another, that have state of their own, ...), the model is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from collie_core.plugin import ConfigError, Scores


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    stack: path of the module that holds the layers (`model`, `model.decoder`).  layers: its child with
    them.  after: its children that follow the layers, in order.  groups: the number of each layer's set of
    arguments beside the hidden states: Gemma 3's layers, for one, have two kinds of positions.
    gives_tuple: a layer returns a tuple, not a tensor.
    """

    stack: str
    layers: str
    after: tuple[str, ...]
    groups: tuple[int, ...]
    gives_tuple: bool

    def renamed(self, name: str) -> str:
        """The name that a parameter (or pattern) of the stock model has in ours."""
        inside = name.removeprefix(f"{self.stack}.")
        if inside == name:
            return f"head.stock.{name}"
        child, _, rest = inside.partition(".")
        if child == self.layers:
            index, _, rest = rest.partition(".")
            return f"blocks.{index}.layer.{rest}"
        return f"head.after.{inside}" if child in self.after else f"embed.stock.{inside}"


@dataclass
class _Call:
    """One call of a module: its name, its first input, its other arguments, and its output."""

    name: str
    hidden: Any
    arguments: dict[str, Any]
    output: Any = None
    attentions: int = 0


@dataclass
class _Trace:
    calls: list[_Call] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, scores: Scores) -> Tensor:
        """Stands in the place of the attention mask."""
        self.calls[-1].attentions += 1
        return q.new_empty((*q.shape[:3], v.shape[3]))


def first(output: Any) -> Any:
    """The hidden states in what a layer or stack returned."""
    return output if isinstance(output, Tensor) else output[0]


def bound(kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `kind.forward` by name, those in `**kwargs` too; the first is the input."""
    found = inspect.signature(kind.forward).bind(None, *args, **kwargs)
    arguments = dict(list(found.arguments.items())[1:])
    for name, parameter in found.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def dissect(model: nn.Module, num_layers: int) -> Anatomy:
    """The parts of a stock model on meta.  Raises ConfigError where it is not made of them."""
    path, layers_name = _find_layers(model, num_layers)
    stack = model.get_submodule(path)
    trace = _run(model, stack, layers_name)
    calls, problem = trace.calls, _layers_problem(trace.calls, num_layers)
    if stack._parameters:
        problem = problem or "its decoder has parameters of its own, outside its layers"
    if problem:
        raise ConfigError(problem)
    numbers = [index for index, call in enumerate(calls) if call.name.isdigit()]
    before, after = calls[: numbers[0]], calls[numbers[-1] + 1 :]
    outside = [call.name for call in before if call.name.startswith("outside:")]
    if outside:
        raise ConfigError(f"{outside[0].partition(':')[2]} comes before its decoder")
    inside = [call for call in after if not call.name.startswith("outside:")]
    hidden = first(calls[numbers[-1]].output)
    names = tuple(call.name for call in inside if call.name != "stack")
    for call in inside:
        if call.name != "stack" and call.hidden is not hidden:
            raise ConfigError(f"{call.name} after its layers does not take what the last layer gives")
        hidden = first(call.output)
    if set(names) & {call.name for call in before} or len(set(names)) != len(names):
        raise ConfigError("a part of it is run both before and after its layers")
    layers = [call for call in calls if call.name.isdigit()]
    return Anatomy(path, layers_name, names, _groups(layers), not isinstance(layers[0].output, Tensor))


def _groups(layers: list[_Call]) -> tuple[int, ...]:
    """Which layers get the very same arguments."""
    kinds: list[dict[str, Any]] = []
    groups = []
    for call in layers:
        same = (number for number, kind in enumerate(kinds) if _same(kind, call.arguments))
        group = next(same, len(kinds))
        if group == len(kinds):
            kinds.append(call.arguments)
        groups.append(group)
    return tuple(groups)


def _same(arguments: Any, others: Any) -> bool:
    """The very same tensors, and equal values of other kinds."""
    if isinstance(arguments, Tensor) or isinstance(others, Tensor):
        return arguments is others
    if isinstance(arguments, dict) and isinstance(others, dict):
        names = arguments.keys() - {"attention_mask"}
        return names == others.keys() - {"attention_mask"} and all(
            _same(arguments[name], others[name]) for name in names
        )
    if isinstance(arguments, list | tuple) and isinstance(others, list | tuple):
        return len(arguments) == len(others) and all(map(_same, arguments, others))
    return bool(arguments is others or arguments == others)


def _find_layers(model: nn.Module, num_layers: int) -> tuple[str, str]:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and "." in name
    ]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise ConfigError(f"it has no single list of {num_layers} layers (found: {listed})")
    path, _, name = found[0].rpartition(".")
    return path, name


def _run(model: nn.Module, stack: nn.Module, layers_name: str) -> _Trace:
    """Run the stock model on one short meta batch, writing down the calls of its parts."""
    trace = _Trace()
    layers = stack.get_submodule(layers_name)
    watched = {str(index): layer for index, layer in enumerate(layers.children())}
    watched |= {name: child for name, child in stack.named_children() if name != layers_name}
    inner = set(map(id, stack.modules()))
    watched |= {
        f"outside:{name}": module
        for name, module in model.named_modules()
        if id(module) not in inner and name and not any(module.children())
    }
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    places = torch.arange(4, device="meta").unsqueeze(0)
    if "position_ids" not in inspect.signature(type(stack).forward).parameters:
        raise ConfigError("its decoder takes no position_ids, which packed records need")
    with ExitStack() as hooks, torch.enable_grad():
        for name, module in watched.items():
            hooks.enter_context(_watch(trace, name, module))
        hooks.enter_context(_watch_output(trace, stack))
        try:
            model(input_ids=ids, position_ids=places, use_cache=False)
        except ConfigError:
            raise
        except Exception as error:  # the reason is what the model did with what every model gets
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(
                f"it does not run with attention and positions from outside ({reason})"
            ) from None
    return trace


@contextmanager
def _watch(trace: _Trace, name: str, module: nn.Module) -> Iterator[None]:
    depth: list[_Call] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = bound(type(module), args, kwargs)
        hidden = arguments.pop(next(iter(arguments), ""), None)
        call = _Call(name, hidden, arguments)
        trace.calls.append(call)
        depth.append(call)
        if not name.isdigit():
            return None
        if "attention_mask" not in inspect.signature(type(module).forward).parameters:
            raise ConfigError("its layers take no attention_mask")
        return (hidden,), arguments | {"attention_mask": trace}

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        depth.pop().output = output

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_output(trace: _Trace, stack: nn.Module) -> Iterator[None]:
    """The end of the stack, as a call whose input is what the stack gives."""

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        trace.calls.append(_Call("stack", first(output), {}, output))

    handle = stack.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def _layers_problem(calls: list[_Call], num_layers: int) -> str:
    layers = [call for call in calls if call.name.isdigit()]
    if [call.name for call in layers] != [str(index) for index in range(num_layers)]:
        return "its layers are not run one after the other, each once"
    where = [index for index, call in enumerate(calls) if call.name.isdigit()]
    if where[-1] - where[0] >= num_layers:
        return f"{calls[where[0] + 1].name} is run between its layers"
    hidden = layers[0].hidden
    for call in layers:
        if call.hidden is not hidden:
            return f"layer {call.name} does not take just what the layer before it gives"
        hidden = first(call.output)
        if call.attentions != 1:
            how = f"{call.attentions} times" if call.attentions else "not at all"
            return f"layer {call.name} calls transformers' attention interface {how}, not once"
        for name, value in call.arguments.items():
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _leaves(value)):
                return f"its layers take {name}, which is computed from its parameters"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value
