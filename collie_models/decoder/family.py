"""What the plugins of families on the shared decoder have in common; it imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.hookspecs import ModelProvider
    from collie_core.run import Run


class DecoderFamily:
    """A model plugin without options.  provider: `module:class` of what serves every checkpoint."""

    collie_api = 1
    provider: ClassVar[str]

    @hookimpl
    def collie_model_provider(self, checkpoint: Any) -> ModelProvider:
        """The family's provider."""
        module, _, name = self.provider.partition(":")
        made: ModelProvider = getattr(importlib.import_module(module), name)()
        return made

    @hookimpl
    def collie_check(self, run: Run) -> Sequence[str]:
        """Refuse records that are longer than the model has positions."""
        from collie_models.decoder.model import position_problems

        return position_problems(run)


def lazily(places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` for names that are imported when they are used: name -> its module."""

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"no attribute {name!r} (known: {', '.join(places)})")
        return getattr(importlib.import_module(places[name]), name)

    return get
