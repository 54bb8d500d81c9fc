"""The peers of `h200.py` as their users run them: a model of transformers, gradient checkpointing, SDPA."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[dict[str, Tensor]], Any]


def stock_model(config: dict[str, Any], dtype: torch.dtype, device: str, liger: bool) -> nn.Module:
    """transformers' LLaMA with random weights, made where it runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    settings |= {"attn_implementation": "sdpa", "use_cache": False}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(before)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained: nn.Module = model.train()
    return trained


def lomo(model: nn.Module, lr: float) -> Step:
    """The published lomo-optim package."""
    from lomo_optim import Lomo

    optimizer: Any = Lomo(model, lr=lr)
    return lambda batch: optimizer.fused_backward(model(**batch).loss, lr)


def clipped_lomo(model: nn.Module, lr: float) -> Step:
    """The same with clipping by the global norm: a pass that measures it, and one that updates."""
    from lomo_optim import Lomo

    optimizer: Any = Lomo(model, lr=lr, clip_grad_norm=1.0)

    def step(batch: dict[str, Tensor]) -> None:
        optimizer.grad_norm(model(**batch).loss)
        optimizer.fused_backward(model(**batch).loss, lr)

    return step


def adalomo(model: nn.Module, lr: float) -> Step:
    """lomo-optim's AdaLomo."""
    from lomo_optim import AdaLomo

    optimizer: Any = AdaLomo(model, lr=lr)
    return lambda batch: optimizer.fused_backward(model(**batch).loss, lr)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Backward, then the optimizer's step."""

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adamw(model: nn.Module, lr: float) -> Step:
    """torch's AdamW, fused on CUDA; its states have the weights' dtype."""
    fused = next(model.parameters()).is_cuda
    return stepped(model, torch.optim.AdamW(model.parameters(), lr=lr, fused=fused))


def adamw8bit(model: nn.Module, lr: float) -> Step:
    """bitsandbytes' AdamW with 8-bit states."""
    import bitsandbytes

    return stepped(model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr))


def peft(model: nn.Module, lr: float) -> Step:
    """peft's LoRA of rank 8 on q and v, AdamW."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, wanted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return stepped(adapted, torch.optim.AdamW(trained, lr=lr))


def unsloth_full(model: nn.Module, lr: float) -> Step:
    """Unsloth, all parameters, AdamW."""
    return adamw(_unsloth(model, full_finetuning=True), lr)


def unsloth_lora(model: nn.Module, lr: float) -> Step:
    """Unsloth, LoRA of rank 8 on q and v, AdamW."""
    from unsloth import FastLanguageModel

    adapted = FastLanguageModel.get_peft_model(
        _unsloth(model), r=8, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing="unsloth"
    )
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return stepped(adapted, torch.optim.AdamW(trained, lr=lr))


def _unsloth(model: Any, **how: Any) -> Any:
    """The model as Unsloth loads it from a folder."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _write_tokenizer(Path(folder), model.config.vocab_size)
        model.to("meta")
        loaded, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False, **how
        )
    return loaded


def _write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of so many words, which loading asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0")
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)


METHODS: dict[str, Callable[[nn.Module, float], Step]] = {
    "lomo": lomo,
    "clipped_lomo": clipped_lomo,
    "adalomo": adalomo,
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "peft": peft,
    "unsloth_full": unsloth_full,
    "unsloth_lora": unsloth_lora,
}
NEEDS = {"unsloth_full": "unsloth", "unsloth_lora": "unsloth", "adamw8bit": "bitsandbytes", "peft": "peft"}
