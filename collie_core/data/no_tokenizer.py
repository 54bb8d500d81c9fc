"""What stands for the tokenizer of a model folder that has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collie_core.errors import DataError


@dataclass(frozen=True)
class NoTokenizer:
    """Records of tokens need no tokenizer; any other is refused.

    folder: of the model.  words: the model knows the ids below it.
    """

    folder: Path
    words: int

    eos_token_id: int | None = None
    chat_template: str | None = None
    all_special_ids: Sequence[int] = ()

    def __len__(self) -> int:
        return self.words

    def refuse(self) -> DataError:
        """Why a record of text cannot be read."""
        return DataError(
            f"a record of text needs a tokenizer, and {self.folder} has none: add the model's, or give "
            "records of tokens and labels"
        )
