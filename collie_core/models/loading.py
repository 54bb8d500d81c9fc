"""Weights from files into a module, one tensor at a time, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collie_core.errors import CheckpointError, PluginError, listed
from collie_core.models.buffers import reset_buffers
from collie_core.models.packed import Packing, pack_piece, packings, unpacked_shape
from collie_core.models.weight_files import write_safetensors_sharded
from collie_core.models.weight_map import Ignore, Merge, Rename, Split, WeightRule
from collie_core.shard import Piece

if TYPE_CHECKING:
    from collie_core.models.sources import Reader
    from collie_core.safetensors_writer import TensorSpec

_log = logging.getLogger(__name__)

_LISTED = 20  # names in a message


def load_weights(
    model: nn.Module,
    rules: Sequence[WeightRule],
    reader: Reader,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    added: Collection[str] = (),
    map_files: bool = False,
) -> None:
    """Give `model` the weights that `reader` has, by the weight map `rules`.  Parameters on meta are
    allocated on `device`.

    dtype: of floating-point parameters; None keeps the stored one.  added: parameters of adapters, which no
    rule speaks of; they get memory but no values.  Beside the model, host memory holds two rules' tensors.
    Raises CheckpointError listing the tensors that are missing, unexpected or of a wrong shape, before any is
    read; PluginError where the weight map does not fit the module.
    """
    slots = Slots(model)
    rules = match_weights(slots, rules, reader, added)
    position = {name: number for number, name in enumerate(reader)}
    copies = [rule for rule in rules if slots.is_copy(rule)]
    originals = [rule for rule in rules if not slots.is_copy(rule)]
    originals.sort(key=lambda rule: position[rule.sources[0]])

    def load(rule: WeightRule) -> None:
        _load_rule(slots, rule, reader, device, dtype, map_files)

    # two threads: one reads while new memory is given to the other; casting 1 GB takes 0.6x the time of one
    with ThreadPoolExecutor(2, thread_name_prefix="weights") as pool:
        list(pool.map(load, originals))
    for rule in copies:
        _compare_copy(slots, rule, reader)
    for name in added:
        slots.allocate(name, device, dtype or torch.float32)
    reset_buffers(model, torch.device(device))


def _load_rule(
    slots: Slots,
    rule: WeightRule,
    reader: Reader,
    device: torch.device | str,
    dtype: torch.dtype | None,
    map_files: bool,
) -> None:
    """Fill the targets of one rule."""
    if any(name in slots.packings for name in rule.targets):
        targets = {n: slots.allocate(n, device, dtype or torch.float32) for n in rule.targets}
        load_pieces({n: Piece.of(target) for n, target in targets.items()}, [rule], reader, slots.packings)
        return
    if isinstance(rule, Rename):
        pages = reader.mapped(rule.source) if map_files else None
        if pages is not None and slots.fits(rule.target, pages, device, dtype):
            slots.replace(rule.target, pages)
            return
        target = slots.allocate(rule.target, device, dtype or reader.dtype(rule.source))
        reader.read_into(rule.source, target)
        return
    loaded = rule.load({name: reader.get(name) for name in rule.sources})
    for name, tensor in loaded.items():
        slots.allocate(name, device, dtype or tensor.dtype).copy_(tensor)


def load_pieces(
    pieces: Mapping[str, Piece],
    rules: Sequence[WeightRule],
    reader: Reader,
    packed: Mapping[str, Packing] = MappingProxyType({}),
) -> None:
    """Fill this rank's pieces of parameters, by name, from the rules of `match_weights`.

    Only the rows that the pieces need are read, where a rule moves rows and does nothing else; the extra
    host memory is at most one rule's tensors.  packed: how those that are not numbers are stored.
    """

    def fill(name: str, piece: Piece, values: Callable[[Piece], None]) -> None:
        if name in packed:
            pack_piece(packed[name], piece, values)
        else:
            values(piece)

    position = {name: number for number, name in enumerate(reader)}
    for rule in sorted(rules, key=lambda rule: position.get(rule.sources[0], 0)):
        wanted = {name: pieces[name] for name in rule.targets if name in pieces}
        wanted = {name: piece for name, piece in wanted.items() if piece.local.numel()}
        if not wanted:
            continue
        if isinstance(rule, Rename | Split | Merge):
            rows = _source_rows(rule, reader)
            for name, piece in wanted.items():
                fill(name, piece, partial(_fill_rows, runs=rows[name], reader=reader))
            continue
        loaded = rule.load({name: reader.get(name) for name in rule.sources})
        for name, piece in wanted.items():
            fill(name, piece, partial(_copy_box, loaded[name]))


def _copy_box(whole: Tensor, piece: Piece) -> None:
    piece.local.detach().copy_(whole[piece.slices])


def _source_rows(rule: WeightRule, reader: Reader) -> dict[str, list[tuple[str, int, int]]]:
    """For each target of a rule that moves rows, (source, first row, rows) of what it is made of, in order.

    The rule itself is asked, with row numbers in the place of rows.
    """
    numbers, begin, begins = {}, 0, []
    for name in rule.sources:
        count = reader.shape(name)[0] if reader.shape(name) else 1
        numbers[name] = torch.arange(begin, begin + count)
        begins.append((begin, name))
        begin += count
    found: dict[str, list[tuple[str, int, int]]] = {}
    for target, order in rule.load(numbers).items():
        breaks = (order.diff() != 1).nonzero().flatten().add(1).tolist() if len(order) > 1 else []
        runs = []
        for first, last in zip([0, *breaks], [*breaks, len(order)], strict=True):
            row = int(order[first])
            start, source = max(entry for entry in begins if entry[0] <= row)
            runs.append((source, row - start, last - first))
        found[target] = runs
    return found


def _fill_rows(piece: Piece, runs: Sequence[tuple[str, int, int]], reader: Reader) -> None:
    """Copy what of the runs, which make the whole one after the other, lies in the piece."""
    if not piece.shape:
        reader.read_box(runs[0][0], (), piece.local.detach())
        return
    low, high = piece.offsets[0], piece.offsets[0] + piece.local.shape[0]
    at = 0
    for source, row, count in runs:
        begin, end = max(low, at), min(high, at + count)
        if begin < end:
            box = (slice(row + begin - at, row + end - at), *piece.slices[1:])
            reader.read_box(source, box, piece.local.detach()[begin - low : end - low])
        at += count


class Slots:
    """The parameters and persistent buffers of a module by name, tied ones known as one.

    The first name of a tied tensor is the tensor's; the others are `copies`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        persistent = model.state_dict(keep_vars=True)
        self.tensors |= {name: tensor for name, tensor in persistent.items() if name not in self.tensors}
        self.packings = packings(model)
        first: dict[int, str] = {}
        self.copies: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            if first.setdefault(id(tensor), name) != name:
                self.copies[name] = first[id(tensor)]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, of a packed one that of the matrix."""
        shape = self.tensors[name].shape
        return unpacked_shape(self.packings[name], shape) if name in self.packings else shape

    def is_copy(self, rule: WeightRule) -> bool:
        """True where everything that the rule holds is tied to tensors of other names."""
        return bool(rule.targets) and all(name in self.copies for name in rule.targets)

    def uncovered(self, rules: Sequence[WeightRule]) -> list[str]:
        """Tensors of their own that no rule fills."""
        targets = {name for rule in rules for name in rule.targets}
        return [name for name in self.tensors if name not in self.copies and name not in targets]

    def allocate(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The tensor to fill; one on meta is first replaced, under all its names, by one with memory."""
        tensor = self.tensors[name]
        if not tensor.is_meta:
            return tensor.detach()
        dtype = dtype if tensor.dtype.is_floating_point else tensor.dtype
        return self.replace(name, torch.empty(tensor.shape, dtype=dtype, device=device))

    def fits(self, name: str, values: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> bool:
        """True where `allocate` would give a tensor of the same kind as `values`."""
        tensor = self.tensors[name]
        wanted = (dtype or values.dtype) if tensor.dtype.is_floating_point else tensor.dtype
        return tensor.is_meta and values.dtype == wanted and values.device == torch.device(device)

    def replace(self, name: str, values: Tensor) -> Tensor:
        """Put `values` in the place of a tensor, under all its names."""
        tensor = self.tensors[name]
        made = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        for alias in [name, *(copy for copy, original in self.copies.items() if original == name)]:
            owner, _, leaf = alias.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, made)
            self.tensors[alias] = made
        return made.detach()


def match_weights(
    slots: Slots, rules: Sequence[WeightRule], reader: Reader, added: Collection[str] = ()
) -> list[WeightRule]:
    """The rules to apply, once checkpoint, rules and module are known to fit; no tensor is read.

    added: parameters that do not come from the checkpoint.  Raises as `load_weights` does.
    """
    _check_rules(slots, rules, added)
    ignored = [rule.pattern for rule in rules if isinstance(rule, Ignore)]
    wanted = [
        _under_either_name(slots, rule, rules, reader)
        for rule in rules
        if rule.targets and (not slots.is_copy(rule) or all(name in reader for name in rule.sources))
    ]
    _refuse_quantised(slots, wanted, reader)
    known = {name for rule in rules for name in rule.sources}
    problems = {
        "missing": [name for rule in wanted for name in rule.sources if name not in reader],
        "unexpected": [
            name
            for name in reader
            if name not in known and not any(fnmatchcase(name, pattern) for pattern in ignored)
        ],
        "of a wrong shape": [
            text
            for rule in wanted
            if all(name in reader for name in rule.sources)
            for text in _shape_problems(slots, rule, reader)
        ],
    }
    if any(problems.values()):
        lines = [f"\n  {kind}: {listed(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"{reader.folder}: the weights do not fit the config{''.join(lines)}")
    return wanted


def _under_either_name(
    slots: Slots, rule: WeightRule, rules: Sequence[WeightRule], reader: Reader
) -> WeightRule:
    """A tied tensor may be in the file twice, or once: under its own name, or under that of its copy."""
    if isinstance(rule, Rename) and rule.source not in reader:
        for other in rules:
            if isinstance(other, Rename) and slots.copies.get(other.target) == rule.target:
                return replace(rule, source=other.source) if other.source in reader else rule
    return rule


def _refuse_quantised(slots: Slots, rules: Sequence[WeightRule], reader: Reader) -> None:
    """Weights of 8 bits or fewer, or packed into whole numbers, where the module computes with floats."""
    found = {
        name: reader.dtype(name)
        for rule in rules
        for name in rule.sources
        if name in reader
        and all(slots.tensors[t].dtype.is_floating_point or t in slots.packings for t in rule.targets)
    }
    quantised = [
        f"{name} ({str(dtype).removeprefix('torch.')})"
        for name, dtype in found.items()
        if not dtype.is_floating_point or dtype.itemsize == 1
    ]
    if quantised:
        raise CheckpointError(
            f"{reader.folder}: the weights are quantised, which is not supported; load the checkpoint that "
            f"they were made from: {listed(quantised)}"
        )


def _check_rules(slots: Slots, rules: Sequence[WeightRule], added: Collection[str]) -> None:
    """Every target must be a parameter, and every parameter that is not `added` a target."""
    unknown = {name for rule in rules for name in rule.targets if name not in slots.tensors}
    uncovered = [name for name in slots.uncovered(rules) if name not in added]
    if unknown or uncovered:
        parts = [f"names {listed(sorted(unknown))}, which the module does not have"] if unknown else []
        parts += [f"has no rule for {listed(uncovered)}"] if uncovered else []
        raise PluginError(f"the weight map of {type(slots.model).__name__} {' and '.join(parts)}")


def _shape_problems(slots: Slots, rule: WeightRule, reader: Reader) -> Iterator[str]:
    """What the rule would make of the stored shapes, compared with the module's."""
    sources = {name: torch.empty(reader.shape(name), device="meta") for name in rule.sources}
    try:
        loaded = rule.load(sources)
    except (ValueError, RuntimeError, IndexError) as error:
        yield f"{' + '.join(rule.sources)} ({error})"
        return
    for name, tensor in loaded.items():
        expected = slots.shape(name)
        if tensor.shape != expected:
            source = " + ".join(rule.sources)
            yield f"{source} ({list(tensor.shape)} in the file, the config asks for {list(expected)})"


def _compare_copy(slots: Slots, rule: WeightRule, reader: Reader) -> None:
    """A file may hold a tied tensor twice; where the two differ, say which one is used."""
    loaded = rule.load({name: reader.get(name) for name in rule.sources})
    for name, tensor in loaded.items():
        used = slots.tensors[name].detach()
        if not torch.equal(tensor.to(used.device, used.dtype), used):
            _log.warning(
                "%s: %s differs from the tensor that it is tied to by tie_word_embeddings; it is not used",
                reader.file(rule.sources[0]),
                " + ".join(rule.sources),
            )


def export_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    rules: Sequence[WeightRule],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write parameters, as they come, under the names and in the layout of the checkpoint.

    specs: parameter name -> (shape, dtype) of everything in `tensors`, in the same order.  A rule whose
    parameters are all absent (tied copies) is left out.  Raises ValueError for a rule with some absent.
    """
    used = [rule for rule in rules if any(name in specs for name in rule.targets)]
    for rule in used:
        absent = [name for name in rule.targets if name not in specs]
        if absent:
            raise ValueError(f"{rule}: no tensor {', '.join(absent)}")
    arrival = {name: number for number, name in enumerate(specs)}
    used.sort(key=lambda rule: max(arrival[name] for name in rule.targets))
    stored: dict[str, TensorSpec] = {}
    for rule in used:
        meta = {
            name: torch.empty(specs[name][0], dtype=specs[name][1], device="meta") for name in rule.targets
        }
        stored |= {name: (tuple(t.shape), t.dtype) for name, t in rule.save(meta).items()}
    write_safetensors_sharded(folder, _saved(tensors, used), stored, max_shard_bytes)


def _saved(tensors: Iterable[tuple[str, Tensor]], rules: list[WeightRule]) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors, each as soon as the parameters that it is made of have come."""
    rule_of = {name: rule for rule in rules for name in rule.targets}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        rule = rule_of[name]
        if all(target in waiting for target in rule.targets):
            yield from rule.save({target: waiting.pop(target) for target in rule.targets}).items()
