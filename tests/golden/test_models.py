"""Every model family against what its original code computed: logits, losses, gradients, generations, steps.

A case is a folder under `cases` with a meta.json; one that is added there is tested without further ado.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from collie_core import AutoModelForCausalLM
from collie_core.models.causal_lm import run_blocks
from collie_core.models.forward import model_context, parts
from collie_core.models.weight_files import WeightReader
from collie_core.ops import Context

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("cases/*/meta.json"))


def load_check() -> ModuleType:
    """check.py, which is a command as well and so no module of a package."""
    spec = importlib.util.spec_from_file_location("golden_check", HERE / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Implementation:
    """What check.py asks of an implementation, by our model."""

    def __init__(self, case: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(case)
        self.model.eval()

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and the inputs of every block (all hidden states but the last)."""
        states: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
            for block in self.model.blocks.values()
        ]
        logits = self.model(**inputs).logits
        for hook in hooks:
            hook.remove()
        return logits, torch.stack(states)

    def loss_backward(self, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and gradients under the checkpoint's names."""
        self.model.zero_grad()
        loss = self.model(**inputs, labels=labels).loss
        assert loss is not None
        loss.backward()
        origin = self.model.origin
        assert origin is not None
        gradients: dict[str, Tensor] = {
            n: p.grad for n, p in self.model.named_parameters() if p.grad is not None
        }
        named: dict[str, Tensor] = {}
        for rule in origin.provider.weight_map(origin.config):
            if rule.targets and all(name in gradients for name in rule.targets):
                named |= rule.save(gradients)
        return loss.detach(), named

    def generate(self, inputs: dict[str, Tensor], n: int, eos: int | None, pad: int) -> Tensor:
        """The new tokens."""
        ids = self.model.generate(
            inputs["input_ids"],
            inputs.get("attention_mask"),
            max_new_tokens=n,
            eos_token_id=-1 if eos is None else eos,
            pad_token_id=pad,
        )
        return ids[:, inputs["input_ids"].shape[1] :]

    def train(
        self, batches: list[tuple[dict[str, Tensor], Tensor]], n: int
    ) -> tuple[list[float], list[float]]:
        """Steps of AdamW, with the loss that training uses."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        )
        losses, norms = [], []
        for step in range(n):
            inputs, labels = batches[step % len(batches)]
            optimizer.zero_grad()
            loss = self.training_loss(inputs, labels)
            loss.backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, norms

    def training_loss(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Mean loss by the fused linear cross entropy, which `forward` does not use."""
        from collie_core.ops import select_ops

        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 4:  # ChatGLM-6B's; the last row hides padding alone
            mask = ~mask[:, 0, -1]
        ctx = Context.build(inputs["input_ids"], mask, inputs.get("position_ids"))
        ctx = model_context(self.model, ctx)
        h = run_blocks(self.model, inputs["input_ids"], ctx)
        total = select_ops().linear_cross_entropy(parts(self.model).head, h, labels, ctx)
        return total / (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_original(case: str) -> None:
    check: Any = load_check()
    rows = check.check(HERE / "cases" / case, Implementation)
    quantities = {row[1] for row in rows}
    assert {"logits", "argmax", "loss", "grad_norm", "generate", "generate_eos", "losses"} <= quantities
    bad = [
        f"{scenario}.{what}: {found:.3e} > {allowed:.3e}"
        for scenario, what, found, allowed, ok in rows
        if not ok
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("case", CASES)
def test_saves_the_originals_tensors(case: str, tmp_path: Path) -> None:
    """Under the same names and byte for byte, but for tables that the original computes anew."""
    source = WeightReader(HERE / "cases" / case)
    [dtype] = {source.dtype(name) for name in source if source.dtype(name).is_floating_point}
    AutoModelForCausalLM.from_pretrained(HERE / "cases" / case, dtype=dtype).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {name for name in source if not name.endswith(("inv_freq", "causal_mask"))}
    for name, tensor in saved.items():
        assert tensor.dtype == dtype and torch.equal(tensor, source.get(name)), name


def test_there_are_cases() -> None:
    assert {
        *("llama_v1", "llama_gqa_tied", "llama3_rope"),
        *("internlm", "internlm2", "moss", "chatglm", "chatglm2"),
    } <= set(CASES)
