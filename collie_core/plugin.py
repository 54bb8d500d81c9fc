"""What plugins build with: one import for everything that a plugin author needs beside torch."""

from __future__ import annotations

from collie_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PluginError,
    Refusal,
    RunFailed,
    UserError,
    nearest,
)
from collie_core.hookspecs import Adapter, Layout, ModelProvider, Monitor, Optimizer, hookimpl
from collie_core.models.adapted import (
    AdaptedLinear,
    Delta,
    Multiply,
    adapt_embedding,
    adapted_linear,
    add_delta,
    block_linears,
    fits,
    linear_dtype,
    merge_deltas,
)
from collie_core.models.causal_lm import CausalLM
from collie_core.models.packed import Packing, pack_linear, unpack_linears
from collie_core.models.weight_map import (
    Ignore,
    Merge,
    ParallelPlan,
    Relative,
    Rename,
    Split,
    Transpose,
    WeightRule,
)
from collie_core.ops import Context, Ops, Scores
from collie_core.ops.rounding import Noise, round_to
from collie_core.optimizers.descent import descend
from collie_core.optimizers.fused import FusedOptimizer
from collie_core.optimizers.gradients import scaled_gradient
from collie_core.run import ParameterGroup, Run
from collie_core.shard import Piece, Shard

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "CausalLM",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "Delta",
    "FusedOptimizer",
    "Ignore",
    "Layout",
    "Merge",
    "ModelProvider",
    "Monitor",
    "Multiply",
    "Noise",
    "Optimizer",
    "Ops",
    "Packing",
    "ParallelPlan",
    "ParameterGroup",
    "Piece",
    "PluginError",
    "Refusal",
    "Relative",
    "Rename",
    "Run",
    "RunFailed",
    "Scores",
    "Shard",
    "Split",
    "Transpose",
    "UserError",
    "WeightRule",
    "adapt_embedding",
    "adapted_linear",
    "add_delta",
    "block_linears",
    "descend",
    "fits",
    "hookimpl",
    "linear_dtype",
    "merge_deltas",
    "nearest",
    "pack_linear",
    "round_to",
    "scaled_gradient",
    "unpack_linears",
]
