"""The data of a run: tokenised once a machine, then cut into steps and batches for each rank."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from collie_core.config.problems import ConfigProblems

if TYPE_CHECKING:
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.data.no_tokenizer import NoTokenizer
    from collie_core.data.reader import DataReader
    from collie_core.hookspecs import Layout, ModelProvider
    from collie_core.run import Run
    from collie_core.train.trainer import Trainer


def required_dataset(
    trainer: Trainer, run: Run, provider: ModelProvider, split: Literal["train", "eval"]
) -> TokenizedDataset:
    """The records that a command cannot do without."""
    data = open_dataset(trainer, run, provider, split)
    if data is None:
        message = f"is required to {'train' if split == 'train' else 'evaluate'}: a file or folder of records"
        raise run.config.problems(ConfigProblems([(("data", split), message)]))
    return data


def open_dataset(
    trainer: Trainer, run: Run, provider: ModelProvider, split: Literal["train", "eval"]
) -> TokenizedDataset | None:
    """The tokenised records of a split, or None where the config has none.

    On each machine one process reads and tokenises them; all map its arrays, whose files are then deleted.
    """
    from collie_core.data.build import build_dataset
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.together import from_first_on_node, together

    given = trainer.train_dataset if split == "train" else trainer.eval_dataset
    source: Any = given if given is not None else getattr(run.config.data, split)
    if source is None or (given is None and source == []):
        return None

    def build() -> TokenizedDataset:
        return build_dataset(
            source,
            run.tokenizer if run.tokenizer is not None else _no_tokenizer(run),
            run.config.data,
            split=split,
            provider_template=provider.template,
            virtual_tokens=run.virtual_tokens,
            progress=run.first,
        )

    if run.world_size == 1:
        return build()

    with ExitStack() as until_mapped:

        def build_for_all() -> Path:
            folder = until_mapped.enter_context(TemporaryDirectory(prefix="collie-data-"))
            build().save(Path(folder))
            return Path(folder)

        folder = from_first_on_node(build_for_all, run.control)
        return together(lambda: TokenizedDataset.open(folder), run.control)


def _no_tokenizer(run: Run) -> NoTokenizer:
    from collie_core.data.no_tokenizer import NoTokenizer
    from collie_core.models.auto import build_model
    from collie_core.models.forward import parts

    assert run.source is not None
    words = max(len(parameter) for parameter in parts(build_model(run.source)).embed.parameters())
    return NoTokenizer(run.source.path, words)


def open_reader(run: Run, data: TokenizedDataset, layout: Layout) -> DataReader:
    """The steps of this rank; the run then knows how many there are, and how large their parts may be."""
    from collie_core.data.build import build_reader
    from collie_core.layouts.grid import data_rank

    config = run.config
    reader = build_reader(
        data,
        config,
        dp_rank=data_rank(config, run.rank),
        pad_token_id=run.pad_token_id,
        count_micro_batches=layout.count_micro_batches if config.pp_size > 1 else None,
    )
    run.largest_micro_batch = reader.largest_micro_batch()
    run.total_steps = reader.total_steps(config.train.epochs)
    if config.train.max_steps is not None:
        run.total_steps = min(run.total_steps, config.train.max_steps)
    return reader


def open_evaluators(run: Run, data: TokenizedDataset | None) -> dict[str, Any]:
    """The config's evaluators on the evaluation data; none without data."""
    from collie_core.data.reader import EvaluationBatches
    from collie_core.layouts.grid import data_rank
    from collie_core.train.evaluation import make_evaluators

    if data is None:
        return {}
    rows = run.config.evaluate.micro_batch_size or run.config.train.micro_batch_size
    batches = EvaluationBatches(
        data,
        micro_batch_size=rows,
        dp_rank=data_rank(run.config, run.rank),
        dp_size=run.config.dp_size,
        pad_token_id=run.pad_token_id,
    )
    return make_evaluators(run.config, batches)
