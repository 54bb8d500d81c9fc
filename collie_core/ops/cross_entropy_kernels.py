# mypy: ignore-errors
"""Triton kernels of `cross_entropy_triton`; a program works on one row of logits.

Imported only where Triton is used, which reads the functions' source and annotations: so no types here.
"""

import triton
import triton.language as tl


@triton.jit
def losses(logits, targets, found, log_sums, ignored, words: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignored:
        tl.store(found + row, 0.0)
        return
    mine = logits + row * words
    highest = float("-inf")
    total = 0.0
    for begin in range(0, words, BLOCK):
        word = begin + tl.arange(0, BLOCK)
        x = tl.load(mine + word, word < words, float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    log_sum = highest + tl.log(total)
    tl.store(log_sums + row, log_sum)
    tl.store(found + row, log_sum - tl.load(mine + target).to(tl.float32))


@triton.jit
def gradients(logits, targets, log_sums, scale, made, ignored, words: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < words
    place = row * words + word
    if target == ignored:
        tl.store(made + place, tl.zeros([BLOCK], tl.float32).to(made.dtype.element_ty), inside)
        return
    x = tl.load(logits + place, inside, float("-inf")).to(tl.float32)
    share = tl.exp(x - tl.load(log_sums + row)) - tl.where(word == target, 1.0, 0.0)
    tl.store(made + place, (share * tl.load(scale)).to(made.dtype.element_ty), inside)
