"""Random tiny checkpoints of ChatGLM-6B and ChatGLM2, and what they compute, written out for one record.

`first` and `second` take neither batches nor padding, and are plain rather than fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family_checkpoints import write_checkpoint
from torch import Tensor

SOP, EOP, MASK, GMASK, PAD = 94, 95, 90, 91, 3
CONFIG_1: dict[str, Any] = {
    "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "bos_token_id": SOP,
    "eos_token_id": EOP,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": PAD,
    "hidden_size": 32,
    "inner_hidden_size": 48,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 64,
    "num_attention_heads": 4,
    "num_layers": 2,
    "position_encoding_2d": True,
    "vocab_size": 96,
}
CONFIG_2: dict[str, Any] = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 40,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "padded_vocab_size": 96,
    "seq_length": 64,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Values that fp16 holds exactly; norms near 1."""
    torch.manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(*shape) * (0.3 if len(shape) > 1 else 0.1)
        norm = "norm" in name and name.endswith("weight")
        made[name] = (tensor + norm).half().float()
    return made


def checkpoint_1(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A ChatGLM-6B in `folder`, its config and tensors."""
    config = CONFIG_1 | changes
    h, f, v = config["hidden_size"], config["inner_hidden_size"], config["vocab_size"]
    shapes: dict[str, Sequence[int]] = {"transformer.word_embeddings.weight": (v, h)}
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}"
        for name, shape in {
            "input_layernorm": (h,),
            "attention.query_key_value": (3 * h, h),
            "attention.dense": (h, h),
            "post_attention_layernorm": (h,),
            "mlp.dense_h_to_4h": (f, h),
            "mlp.dense_4h_to_h": (h, f),
        }.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    shapes |= {"transformer.final_layernorm.weight": (h,), "transformer.final_layernorm.bias": (h,)}
    tensors = random_tensors(shapes)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    if not config.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    write_checkpoint(folder, config, tensors)
    return config, tensors


def checkpoint_2(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A ChatGLM2 in `folder`, its config and tensors."""
    config = CONFIG_2 | changes
    h, f, v, d = (
        config[key] for key in ("hidden_size", "ffn_hidden_size", "padded_vocab_size", "kv_channels")
    )
    n = config["num_attention_heads"]
    g = config["multi_query_group_num"] if config["multi_query_attention"] else n
    linear, qkv = config["add_bias_linear"], config["add_bias_linear"] or config["add_qkv_bias"]
    norm = not config.get("rmsnorm", True)
    shapes: dict[str, Sequence[int]] = {"transformer.embedding.word_embeddings.weight": (v, h)}
    for i in range(config["num_layers"]):
        for name, shape, bias in (
            ("input_layernorm", (h,), norm),
            ("self_attention.query_key_value", ((n + 2 * g) * d, h), qkv),
            ("self_attention.dense", (h, n * d), linear),
            ("post_attention_layernorm", (h,), norm),
            ("mlp.dense_h_to_4h", (2 * f, h), linear),
            ("mlp.dense_4h_to_h", (h, f), linear),
        ):
            shapes[f"transformer.encoder.layers.{i}.{name}.weight"] = shape
            if bias:
                shapes[f"transformer.encoder.layers.{i}.{name}.bias"] = shape[:1]
    if config.get("post_layer_norm", True):
        shapes["transformer.encoder.final_layernorm.weight"] = (h,)
        if norm:
            shapes["transformer.encoder.final_layernorm.bias"] = (h,)
    shapes["transformer.output_layer.weight"] = (v, h)
    tensors = random_tensors(shapes)
    write_checkpoint(folder, config, tensors)
    return config, tensors


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """(S, heads, d) each -> (S, heads * d)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def first(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Sequence[int]) -> Tensor:
    """Logits (S, V) of ChatGLM-6B in fp64 for one record."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    n, h, s = config["num_attention_heads"], config["hidden_size"], len(ids)
    d = h // n
    sop = ids.index(SOP)
    mask = ids.index(GMASK) if GMASK in ids else ids.index(MASK)
    place = torch.tensor([i if i < sop else mask for i in range(s)])
    block = torch.tensor([0 if i < sop else i - sop + 1 for i in range(s)])
    visible = torch.tensor([[k <= q or k < sop for k in range(s)] for q in range(s)])
    half = d // 2
    theta = (10000.0 ** (-torch.arange(0, half, 2).float() / half)).half().double()

    def rotate(x: Tensor) -> Tensor:
        parts = []
        for part, positions in ((x[..., :half], place), (x[..., half:], block)):
            angle = positions[:, None, None].double() * theta
            a, b = part[..., : half // 2], part[..., half // 2 :]
            parts += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.cat(parts, -1)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (h,), t[f"{name}.weight"], t[f"{name}.bias"], config["layernorm_epsilon"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    alpha = (2 * 28) ** 0.5
    x = t["transformer.word_embeddings.weight"][list(ids)]
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}"
        a = norm(f"{layer}.input_layernorm", x)
        q, k, v = linear(f"{layer}.attention.query_key_value", a).view(s, n, 3, d).unbind(2)
        x = alpha * a + linear(f"{layer}.attention.dense", attend(rotate(q), rotate(k), v, visible))
        m = norm(f"{layer}.post_attention_layernorm", x)
        inner = F.gelu(linear(f"{layer}.mlp.dense_h_to_4h", m), approximate="tanh")
        x = alpha * m + linear(f"{layer}.mlp.dense_4h_to_h", inner)
    return norm("transformer.final_layernorm", x) @ t["lm_head.weight"].T


def second(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Sequence[int]) -> Tensor:
    """Logits (S, V) of ChatGLM2 in fp64 for one record, with every option of its config."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    n, h, d, s = config["num_attention_heads"], config["hidden_size"], config["kv_channels"], len(ids)
    f, half, ratio = config["ffn_hidden_size"], config["kv_channels"] // 2, config.get("rope_ratio", 1)
    old = "_name_or_path" in config
    base, divisor = (10000.0, ratio) if old else (10000.0 * ratio, 1)
    angle = torch.arange(s)[:, None, None] / divisor * base ** (-torch.arange(0, half, 2).double() / half)
    visible = torch.ones(s, s, dtype=torch.bool).tril()

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., 0:half:2], x[..., 1:half:2]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat((torch.stack(turned, -1).flatten(-2), x[..., half:]), -1)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, eps = t[f"{name}.weight"], config["layernorm_epsilon"]
        if config.get("rmsnorm", True):
            return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return F.layer_norm(x, (h,), weight, t[f"{name}.bias"], eps)

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ t[f"{name}.weight"].T
        return out + t[f"{name}.bias"] if f"{name}.bias" in t else out

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not config["multi_query_attention"]:
            q, k, v = x.view(s, n, 3, d).unbind(2)
            return q, k, v
        g = config["multi_query_group_num"]
        q, k, v = (part.view(s, -1, d) for part in x.split([n * d, g * d, g * d], -1))
        return q, k.repeat_interleave(n // g, 1), v.repeat_interleave(n // g, 1)

    after = config.get("apply_residual_connection_post_layernorm", False)
    x = t["transformer.embedding.word_embeddings.weight"][list(ids)]
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        a = norm(f"{layer}.input_layernorm", x)
        q, k, v = split(linear(f"{layer}.self_attention.query_key_value", a))
        out = linear(f"{layer}.self_attention.dense", attend(rotate(q), rotate(k), v, visible))
        x = (a if after else x) + out
        m = norm(f"{layer}.post_attention_layernorm", x)
        inner = linear(f"{layer}.mlp.dense_h_to_4h", m)
        out = linear(f"{layer}.mlp.dense_4h_to_h", F.silu(inner[:, :f]) * inner[:, f:])
        x = (m if after else x) + out
    if config.get("post_layer_norm", True):
        x = norm("transformer.encoder.final_layernorm", x)
    return x @ t["transformer.output_layer.weight"].T
