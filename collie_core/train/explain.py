"""Why a config is refused and what works instead, or what each rank holds and does under it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from collie_core.config.checks import accumulation_steps, global_batch_size
from collie_core.errors import Refusal

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig


@dataclass(frozen=True)
class Explanation:
    """refused: problems of the selected plugins; where there are any, `works` has the overrides, such as
    {"tp_size": 1}, of the nearest combination that is accepted, or None where no plugin knows one.
    topics: of an accepted config, text by topic, by who says it.
    """

    config: str
    refused: list[str] = field(default_factory=list)
    works: dict[str, Any] | None = None
    topics: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """As plain data."""
        refused = [
            {"rule": one.rule, "reason": one.reason, "advice": one.advice, "instead": one.instead}
            if isinstance(one, Refusal)
            else {"rule": None, "reason": one, "advice": None, "instead": None}
            for one in self.refused
        ]
        return {
            "config": self.config,
            "accepted": not refused,
            "refused": refused,
            "works": self.works,
            "explanation": self.topics,
        }

    def lines(self) -> Iterator[str]:
        """As text."""
        for problem in self.refused:
            if isinstance(problem, Refusal):
                yield f"refused: {problem.rule}"
                yield f"  reason: {problem.reason}"
                yield f"  what works: {problem.advice}"
            else:
                yield f"refused: {problem}"
        if self.works is not None:
            yield f"nearest combination that works: {' '.join(overrides(self.works))}"
        for origin, topics in self.topics.items():
            yield f"{origin}:"
            yield from (f"  {topic}: {text}" for topic, text in topics.items())


def explain(path: str, changes: Sequence[str]) -> Explanation:
    """The explanation of a config file with overrides.  Raises ConfigError for plain mistakes in it."""
    from collie_core.config.load import load_config
    from collie_core.train.setup import checked_plugins

    config = load_config(path, changes)
    run, plugins, problems = checked_plugins(config)
    if not problems:
        said = {origin: dict(topics) for origin, topics in plugins.explain(run).items()}
        return Explanation(path, topics={"step": {"global batch": _arithmetic(config)}, **said})
    refused: list[str] = problems
    works: dict[str, Any] = {}
    while problems:  # a change may uncover another rule
        known = [problem for problem in problems if isinstance(problem, Refusal)]
        found = {key: value for one in known for key, value in one.instead.items()}
        if len(known) < len(problems) or not found.keys() - works.keys():
            return Explanation(path, refused)
        works = {**works, **found}
        problems = checked_plugins(load_config(path, [*changes, *overrides(works)]))[2]
    return Explanation(path, refused, works)


def overrides(changes: dict[str, Any]) -> list[str]:
    """Keys and values as the command line takes them."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()
    ]


def _arithmetic(config: CollieConfig) -> str:
    return (
        f"micro_batch_size {config.train.micro_batch_size} x accumulation {accumulation_steps(config)} x "
        f"dp_size {config.dp_size} = {global_batch_size(config)} rows"
    )
