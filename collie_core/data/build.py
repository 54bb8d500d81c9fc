"""The data of a run, ready before it touches anything: every record read, rendered, tokenised and checked."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from collie_core.config.checks import accumulation_steps
from collie_core.config.schema import CollieConfig, DataSection
from collie_core.data.dataset import Counts, TokenizedDataset, count_targets
from collie_core.data.reader import DataReader
from collie_core.data.records import IGNORED, Rendered, Tokens, render
from collie_core.data.sources import BadRecord, Source, Sources, open_sources, origin, sections_of
from collie_core.data.templates import find_template
from collie_core.data.tokenize import Tokenize
from collie_core.errors import DataError

logger = logging.getLogger(__name__)

BATCH = 512  # records tokenised at once


def build_dataset(
    sources: Sources | None,
    tokenizer: Any,
    section: DataSection,
    *,
    split: Literal["train", "eval"],
    provider_template: str | None = None,
    virtual_tokens: int = 0,
    progress: bool = True,
) -> TokenizedDataset:
    """Read and tokenise every record of a split.

    sources: `config.data.train` or `.eval`, or an object with a length and records as items.
    provider_template: the model family's chat template, used where the tokenizer has none.
    virtual_tokens: of an adapter, put before every record (ids -1, -2, ...) and a part of its length.
    progress: show a bar on stderr (where that is a terminal); false on all ranks but one.

    Raises DataError for a missing or unreadable source; for the first bad record, unless
    `section.on_bad_record` is skip; and where no record is left.
    """
    if sources is None:
        raise DataError(f"data.{split} is not set: give a file, a folder or a Hugging Face data set")
    weights = _weights(sources, split)
    opened = open_sources(sources, split)
    reading = _Reading(tokenizer, section, split, provider_template, virtual_tokens)
    with _progress_bar(sum(len(source) for group in opened for source in group), split, progress) as advance:
        for group, members in enumerate(opened):
            before = reading.records
            for source in members:
                for first in range(0, len(source), BATCH):
                    indices = range(first, min(first + BATCH, len(source)))
                    reading.add(group, source, indices)
                    advance(len(indices))
            if reading.records == before:
                names = ", ".join(source.name for source in members)
                raise DataError(f"data.{split}: no record of {names} can be used: {reading.losses()}")
    reading.report()
    return reading.dataset(weights)


def build_reader(
    dataset: TokenizedDataset,
    config: CollieConfig,
    *,
    dp_rank: int,
    pad_token_id: int,
    count_micro_batches: Callable[[int], int] | None = None,
) -> DataReader:
    """The reader of a run's training steps on one data-parallel rank; see `DataReader`."""
    return DataReader(
        dataset,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=accumulation_steps(config),
        dp_rank=dp_rank,
        dp_size=config.dp_size,
        seed=config.seed,
        packing=config.data.packing,
        pad_token_id=pad_token_id,
        max_length=config.data.max_length,
        count_micro_batches=count_micro_batches,
    )


def _weights(sources: Sources, split: str) -> tuple[float, ...] | None:
    given = [section.weight for section in sections_of(sources)]
    weights = tuple(weight for weight in given if weight is not None)
    if weights and len(weights) < len(given):
        raise DataError(f"data.{split}: give every source a weight, or none")
    return weights or None


@dataclass
class _Loss:
    """Records left out for one reason: how many, and where the first ones are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(where)

    def __str__(self) -> str:
        return f"{self.count} ({', '.join(self.first)}{', ...' if self.count > len(self.first) else ''})"


class _Reading:
    """Gathers the tokens of all records, and what was left out of them."""

    def __init__(
        self,
        tokenizer: Any,
        section: DataSection,
        split: str,
        provider_template: str | None,
        virtual_tokens: int,
    ) -> None:
        self._tokenizer, self._section, self._split = tokenizer, section, split
        self._template = find_template(section.template, tokenizer, provider_template)
        self._tokenize = Tokenize(tokenizer)
        self._virtual = -1 - np.arange(virtual_tokens, dtype=np.int32)
        self._ids: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.int32]] = []
        self._lengths = array("q")
        self._places = array("q")  # group, file and number of each record
        self._names: list[str] = []
        self._skipped: dict[str, _Loss] = {}
        self._dropped, self._truncated = _Loss(), _Loss()

    @property
    def records(self) -> int:
        """Records that can be used so far."""
        return len(self._lengths)

    def add(self, group: int, source: Source, indices: range) -> None:
        """Read a batch of records of one source, in order."""
        if not self._names or self._names[-1] != source.name:
            self._names.append(source.name)
        rendered = {index: self._render(source, index) for index in indices}
        texts = {index: one for index, one in rendered.items() if isinstance(one, Rendered)}
        tokenised = dict(zip(texts, self._tokenize(list(texts.values())), strict=True))
        kept: list[Tokens] = []
        for index, one in rendered.items():
            found = tokenised.get(index, one)
            assert not isinstance(found, Rendered)
            number = source.number(index)
            tokens = self._accept(found, origin(source.name, number))
            if tokens is not None:
                kept.append(tokens)
                self._lengths.append(len(tokens.ids))
                self._places.extend((group, len(self._names) - 1, number))
        if kept:
            self._ids.append(np.concatenate([tokens.ids for tokens in kept]))
            self._labels.append(np.concatenate([tokens.labels for tokens in kept]))

    def _render(self, source: Source, index: int) -> Rendered | Tokens | BadRecord:
        try:
            return render(source.record(index), self._tokenizer, self._template)
        except BadRecord as bad:
            return bad
        except DataError as error:
            raise DataError(f"{origin(source.name, source.number(index))}: {error}") from None

    def _accept(self, found: Tokens | BadRecord, where: str) -> Tokens | None:
        """The record cut to max_length, or None where it is left out."""
        if isinstance(found, Tokens) and not (found.labels[1:] != IGNORED).any():
            found = BadRecord("has no token to train after its first")
        if isinstance(found, BadRecord):
            if self._section.on_bad_record == "stop":
                raise DataError(f"{where}: {found} (data.on_bad_record: skip leaves such records out)")
            self._skipped.setdefault(found.reason, _Loss()).add(where)
            return None
        size = self._section.max_length - len(self._virtual)
        labels = found.labels[:size].copy()
        labels[0] = IGNORED
        if len(found.ids) > size:
            if not (labels != IGNORED).any():
                self._dropped.add(where)
                return None
            self._truncated.add(where)
        before = np.full_like(self._virtual, IGNORED)
        return Tokens(np.append(self._virtual, found.ids[:size]), np.append(before, labels))

    def losses(self) -> str:
        """Why records were left out, for messages."""
        told = [f"{reason}: {loss}" for reason, loss in self._skipped.items()]
        if self._dropped.count:
            told.append(f"no target token within data.max_length {self._section.max_length}: {self._dropped}")
        return "; ".join(told)

    def report(self) -> None:
        """Warn of records that were left out or cut."""
        if losses := self.losses():
            logger.warning("data.%s: records left out: %s", self._split, losses)
        if self._truncated.count:
            length = self._section.max_length
            logger.warning("data.%s: records cut at max_length %d: %s", self._split, length, self._truncated)

    def dataset(self, weights: tuple[float, ...] | None) -> TokenizedDataset:
        """Everything gathered, in flat arrays."""
        tokens = np.concatenate(self._ids)
        self._ids = []  # one list is freed before the next is doubled
        labels = np.concatenate(self._labels)
        self._labels = []
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        groups, files, numbers = np.array(self._places).reshape(-1, 3).T
        counts = Counts(
            records=self.records,
            tokens=len(tokens),
            target_tokens=int(count_targets(labels, offsets).sum()),
            truncated=self._truncated.count,
            dropped=self._dropped.count,
            skipped={reason: loss.count for reason, loss in self._skipped.items()},
        )
        return TokenizedDataset(
            tokens=tokens,
            labels=labels,
            offsets=offsets,
            groups=groups.astype(np.int32),
            files=files.astype(np.int32),
            numbers=numbers.copy(),
            names=tuple(self._names),
            weights=weights,
            counts=counts,
        )


@contextmanager
def _progress_bar(total: int, split: str, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A function that moves the bar on by a number of records."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    shown = wanted and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(f"tokenising data.{split}", total=total)
        yield lambda count: progress.advance(task, count)
