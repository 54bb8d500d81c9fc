"""Initial values of A, B and magnitudes: functions of seed, name and weight alone, whatever the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from collie_methods.lora.plugin import LoraOptions


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one parameter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial(
    options: LoraOptions,
    leaf: str,
    shape: tuple[int, ...],
    seed: int,
    name: str,
    weight: Callable[[], Tensor],
) -> Tensor:
    """The whole parameter `leaf` of a delta, fp32; `weight` gives the linear's, (outputs, inputs).

    name: of the parameter.  PiSSA's pairs are drawn by the linear's name, so that they agree.
    """
    if leaf == "magnitude":
        return torch.linalg.vector_norm(weight().float(), dim=1)
    linear = name.partition(".adapters.")[0]
    if options.init_lora_weights.startswith("pissa"):
        a, b = principal(weight().float(), options, seed, linear)
        return a if leaf.endswith("_A") else b
    if leaf == "lora_B":
        return torch.zeros(shape)
    random = generator(seed, name)
    if options.init_lora_weights == "gaussian":
        return torch.randn(shape, generator=random) / options.r
    bound = shape[1] ** -0.5  # peft's: He et al. 2015 (arXiv 1502.01852) with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=random)


def principal(weight: Tensor, options: LoraOptions, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """(A, B) with s B A the best approximation of rank r of the weight (arXiv 2404.02948, eqs. 2 and 3).

    With `pissa_niter_N` by N power iterations (Halko et al. 2011, arXiv 0909.4061).
    """
    _, _, iterations = options.init_lora_weights.partition("_niter_")
    r = options.r
    if iterations:
        # svd_lowrank draws from the global generators, which go on as if it had not
        with torch.random.fork_rng():
            torch.manual_seed(generator(seed, name).initial_seed())
            u, s, v = torch.svd_lowrank(weight, r, int(iterations))
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / options.scaling).sqrt()
    return root.unsqueeze(1) * vh[:r], u[:, :r] * root
