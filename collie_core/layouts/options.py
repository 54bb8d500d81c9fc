"""The keys of the native layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NativeOptions:
    """Keys of `layout:`.

    zero_stage: what data-parallel ranks share: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights
    too.  pp_partition: blocks of each pipeline stage: balanced by parameters or by compute, as many for
    each, or their numbers.  pp_microbatches: pieces of a rank's step batch in the pipeline; auto: of
    micro_batch_size rows, at least pp_size.  pp_stretches: stretches of blocks a rank has under
    `interleaved`.  sequence_parallel: cut activations between tensor-parallel layers; auto: yes.
    offload: `cpu` keeps weights, gradients and optimizer states in host memory; with zero_stage 3 the
    device has the weights of one block at a time, also where there is one process.
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    pp_schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    pp_partition: Literal["parameters", "compute", "uniform"] | tuple[int, ...] = "parameters"
    pp_microbatches: Literal["auto"] | int = "auto"
    pp_stretches: int = 2
    sequence_parallel: Literal["auto"] | bool = "auto"
    offload: Literal["none", "cpu"] = "none"

    def stretches(self, pp_size: int) -> int:
        """Stretches of blocks of a rank."""
        return self.pp_stretches if self.pp_schedule == "interleaved" and pp_size > 1 else 1

    def micro_batches(self, rows: int, micro_batch_size: int, pp_size: int) -> int:
        """Pieces of a rank's `rows` of a step; only as many as it has rows are made."""
        pieces = -(-rows // micro_batch_size)
        if pp_size == 1:
            return pieces
        return max(pp_size, pieces) if self.pp_microbatches == "auto" else self.pp_microbatches

    def shards_parameters(self, dp_size: int) -> bool:
        """True where FSDP2 holds the parameters."""
        return (self.zero_stage > 0 and dp_size > 1) or self.offload == "cpu"
