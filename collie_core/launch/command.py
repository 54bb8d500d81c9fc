"""A command that may need several processes: join those that there are, or start them on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from collie_core.errors import UserError

if TYPE_CHECKING:
    from collie_core.config.schema import CollieConfig


def run_command(
    name: str,
    args: argparse.Namespace,
    options: Sequence[str],
    split: Literal["train", "eval"],
    work: Callable[[CollieConfig], int],
) -> int:
    """`work(config)` in every process of the job; returns the exit status.

    args: `config`, `overrides` and `nproc` (or None) of `collie NAME`, which started processes get with
    `options`.  split: the data that the command needs.
    """
    from collie_core.config.load import load_config
    from collie_core.launch.rank import as_rank, final_status
    from collie_core.launch.world import current_world

    world = current_world()
    if world.launcher == "none":
        from collie_core.config.checks import product
        from collie_core.launch.preflight import check_before_launch, check_devices

        config = load_config(args.config, args.overrides)
        _check_nproc(args.nproc, config)
        if product(config) > 1:
            from collie_core.launch.launcher import launch

            check_before_launch(config, split)
            check_devices(config)
            command = ["-m", "collie_core", name, args.config, *args.overrides, *options]
            return launch(command, product(config), config.train.stop_grace)
        return work(config)
    with as_rank(world):
        config = load_config(args.config, args.overrides)
        _check_nproc(args.nproc, config)
        status = work(config)
    return final_status(world, status)


def _check_nproc(nproc: int | None, config: CollieConfig) -> None:
    from collie_core.config.checks import arithmetic, product

    if nproc is not None and nproc != product(config):
        raise UserError(
            f"--nproc {nproc}, but {arithmetic(config)}; leave --nproc out, or change a size such as dp_size"
        )
