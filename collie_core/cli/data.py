"""`collie data show CONFIG [-n N] [--split train|eval] [--json] [key.path=value ...]`"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig
    from collie_core.data.dataset import TokenizedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=["show"], help="print records as the model sees them, and counts")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    parser.add_argument("-n", type=_count, default=3, metavar="N", help="number of records (default 3)")
    parser.add_argument("--split", choices=["train", "eval"], default="train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def run(args: argparse.Namespace) -> int:
    """Tokenise the whole split and show its first records."""
    from collie_core.config.load import load_config
    from collie_core.data.build import build_dataset
    from collie_core.models.provider import select_provider

    config = load_config(args.config, args.overrides)
    model = config.model
    selected = select_provider(
        model.path, provider=model.provider, revision=model.revision, weights=False
    )
    provider = selected.provider
    tokenizer = provider.tokenizer(selected.path)
    sources = getattr(config.data, args.split)
    dataset = build_dataset(
        sources, tokenizer, config.data, split=args.split, provider_template=provider.template
    )
    figures = _figures(dataset, config, args.split)
    shown = range(min(args.n, len(dataset)))
    if args.json:
        records = [_as_json(dataset, record, tokenizer) for record in shown]
        print(json.dumps({"records": records, "counts": figures}, ensure_ascii=False))
    else:
        _print(dataset, shown, tokenizer, figures)
    return 0


class Piece(NamedTuple):
    """Text of neighbouring tokens that are all trained, or all not."""

    text: str
    trained: bool


def pieces(ids: list[int], trained: list[bool], tokenizer: Any) -> list[Piece]:
    """The text of a record, special tokens written out, cut where the mask changes."""
    special = set(tokenizer.all_special_ids)
    found: list[Piece] = []
    names: dict[int, str] = {}
    for is_special, same in groupby(range(len(ids)), lambda place: ids[place] in special):
        places = list(same)
        if is_special:
            # some tokenizers' own names of special tokens are empty
            names = names or {index: token for token, index in tokenizer.get_vocab().items()}
            found += [Piece(names[ids[place]], trained[place]) for place in places]
        else:
            found += _plain_pieces(
                [ids[place] for place in places], [trained[place] for place in places], tokenizer
            )
    return [
        Piece("".join(piece.text for piece in alike), is_trained)
        for is_trained, alike in groupby(found, lambda piece: piece.trained)
    ]


def _plain_pieces(ids: list[int], trained: list[bool], tokenizer: Any) -> Iterator[Piece]:
    before, end = "", 0
    for is_trained, same in groupby(trained):
        end += len(list(same))
        # decoded from the start, for a token alone may lose its space
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text[len(before) :], is_trained)
        before = text


def _record(dataset: TokenizedDataset, record: int) -> tuple[list[int], list[int]]:
    here = slice(dataset.offsets[record], dataset.offsets[record + 1])
    return dataset.tokens[here].tolist(), dataset.labels[here].tolist()


def _as_json(dataset: TokenizedDataset, record: int, tokenizer: Any) -> dict[str, Any]:
    from collie_core.data.records import IGNORED

    ids, labels = _record(dataset, record)
    shown = pieces(ids, [label != IGNORED for label in labels], tokenizer)
    return {
        "origin": dataset.origin(record),
        "tokens": ids,
        "labels": labels,
        "pieces": [piece._asdict() for piece in shown],
    }


def _figures(dataset: TokenizedDataset, config: CollieConfig, split: str) -> dict[str, Any]:
    from collie_core.data.build import build_reader

    counts = dataset.counts
    figures: dict[str, Any] = {
        "records": counts.records,
        "tokens": counts.tokens,
        "trained_tokens": counts.target_tokens,
        "trained_percent": round(100 * counts.target_tokens / counts.tokens, 1),
        "cut_at_max_length": counts.truncated,
        "dropped_without_target": counts.dropped,
        "skipped": counts.skipped,
    }
    if split == "train":
        reader = build_reader(dataset, config, dp_rank=0, pad_token_id=0)
        rows = reader.rows(0)
        figures["rows"] = len(rows)
        if config.data.packing:
            packed = int(dataset.lengths[rows.records].sum())
            figures["fill_percent"] = round(100 * packed / (len(rows) * config.data.max_length), 1)
        figures["steps_per_epoch"] = reader.steps_per_epoch(0)
    return figures


def _print(dataset: TokenizedDataset, shown: range, tokenizer: Any, figures: dict[str, Any]) -> None:
    """Records with trained text in green, or «between marks» where the output has no colours; then counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from collie_core.data.records import IGNORED

    console = Console(highlight=False, markup=False)
    for record in shown:
        ids, labels = _record(dataset, record)
        trained = [label != IGNORED for label in labels]
        console.print(
            Text(f"{dataset.origin(record)}: {len(ids)} tokens, {sum(trained)} trained", style="bold"),
            soft_wrap=True,  # a path is one word
        )
        text = Text()
        for piece in pieces(ids, trained, tokenizer):
            if console.is_terminal:
                text.append(piece.text, style="green" if piece.trained else "dim")
            else:
                text.append(f"«{piece.text}»" if piece.trained else piece.text)
        console.print(text, soft_wrap=True)
        console.print()
    table = Table(show_header=False)
    skipped = figures["skipped"]
    for name, value in figures.items():
        if name != "skipped":
            table.add_row(name.replace("_", " "), f"{value:,}")
    for reason, count in skipped.items():
        table.add_row(f"skipped: {reason}", f"{count:,}")
    console.print(table)
