"""transformers' tensor-parallel plans in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from collie_core.plugin import ParallelPlan
from collie_models.hf.anatomy import Anatomy

_STYLES: Mapping[str, str] = {
    "colwise": "columns",
    "rowwise": "rows",
    "replicated_with_grad_allreduce": "partial",
}
#: Styles of the embedding, which is cut by vocabulary wherever it is a plain one.
_EMBEDDING_STYLES = ("embedding_rowwise", "vocab", "rowwise_rep")


def parallel_plan(config: PreTrainedConfig, stock: PreTrainedModel, anatomy: Anatomy) -> ParallelPlan:
    """Columns, rows and partial sums of the library's plan; embedding and head where they are plain.

    Without a plan that this engine computes, layers are whole on every rank.
    """
    cut: dict[str, tuple[str, ...]] = {}
    for name, style in _translatable(config).items():
        path = f"{stock.base_model_prefix}.{name}" if stock.base_model_prefix else name
        kind = _STYLES[style]
        cut[kind] = (*cut.get(kind, ()), f"{anatomy.renamed(path)}.*")
    embedding, head = stock.get_input_embeddings(), stock.get_output_embeddings()
    names = {id(module): name for name, module in stock.named_modules()}
    embedding_name = f"{anatomy.renamed(names[id(embedding)])}.weight" if embedding is not None else ""
    head_name = anatomy.renamed(names[id(head)]) if head is not None else ""
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    plain = type(embedding) is nn.Embedding  # one that scales its vectors, as Gemma's, must stay as it is
    plain_head = type(head) is nn.Linear and (plain or not tied)
    columns = cut.get("columns", ())
    heads = config.num_attention_heads
    return ParallelPlan(
        columns=columns,
        rows=cut.get("rows", ()),
        embedding=(embedding_name,) if plain else (),
        head=(f"{head_name}.*",) if plain_head else (),
        tied=((embedding_name, f"{head_name}.weight"),) if tied else (),
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        heads=heads if columns else None,
        keys_values=tuple(name for name in columns if name.endswith((".k_proj.*", ".v_proj.*"))),
        partial=cut.get("partial", ()),
        sequence=False,
    )


def tensor_parallel_problems(config: PreTrainedConfig, sequence_parallel: object) -> list[str]:
    """Why this model cannot be cut."""
    found = []
    if not _translatable(config):
        found.append(
            f"transformers has no tensor-parallel plan for {config.model_type} that fits; set tp_size: 1"
        )
    dropout = [key for key in ("attention_dropout", "attn_pdrop", "resid_pdrop") if getattr(config, key, 0)]
    if dropout:
        found.append(f"tp_size above 1 needs {' and '.join(dropout)} of 0 in config.json")
    if sequence_parallel is True:
        found.append("layers of transformers need whole sequences; set layout.sequence_parallel: false")
    return found


def _translatable(config: PreTrainedConfig) -> dict[str, str]:
    """The plan of the layers, or nothing where it has a style that this engine does not compute."""
    plan = {
        name: style
        for name, style in (config.base_model_tp_plan or {}).items()
        if style not in _EMBEDDING_STYLES and fnmatchcase(name, "*.[*].*")
    }
    # fused projections are laid out by heads in ways of their own
    fused = any("qkv" in name or "query_key_value" in name for name in plan)
    return plan if all(style in _STYLES for style in plan.values()) and not fused else {}
