#!/usr/bin/env python
"""Compare an implementation with a golden case.

    check.py CASE_DIR --impl package.module:factory [--only logits,loss,...]

factory(case_dir) must return an object with
    forward(inputs) -> logits [B, S, V], or (logits, hidden_states [L+1, B, S, H]); hidden states are optional
    loss_backward(inputs, labels) -> (loss, grads): grads is {original parameter name: gradient} or just the
        global grad norm (a tied weight counted once); gradients must be cleared between calls
    generate(inputs, n, eos, pad) -> the n new ids per row [B, n]; eos None = never stop early; a finished
        row gets pad
    train(batches, n) (optional) -> (losses, grad norms) of n AdamW steps, batches cycled (meta.json "train")
inputs holds exactly what the original forward was given: input_ids and, by scenario, attention_mask and
position_ids.  Only this file, meta.json and the safetensors of the case are needed.
"""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

INPUTS = ("input_ids", "attention_mask", "position_ids")


def load_case(case_dir):
    case_dir = Path(case_dir)
    meta = json.loads((case_dir / "meta.json").read_text())
    flat = load_file(str(case_dir / "golden.safetensors"))
    scn = {}
    for k, v in flat.items():
        a, b = k.split(".", 1)
        scn.setdefault(a, {})[b] = v
    return meta, scn


def scenario_inputs(s):
    return {k: s[k] for k in INPUTS if k in s}


def _maxdiff(a, b):
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def check(case_dir, factory, only=None, tol=None, scenarios=None):
    """Returns rows (scenario, quantity, difference, allowed, ok)."""
    meta, scn = load_case(case_dir)
    t = dict(meta["suggested_tolerance"], **(tol or {}))
    impl = factory(str(case_dir))
    rows = []

    def put(s, q, d, allowed):
        rows.append((s, q, d, allowed, bool(d <= allowed) and not math.isnan(d)))

    def want(q):
        return only is None or q in only

    for name in scenarios or meta["scenarios"]:
        s = scn[name]
        inp, v = scenario_inputs(s), s["valid"].bool()
        if want("logits") or want("hidden"):
            with torch.no_grad():
                out = impl.forward(inp)
            lg, hs = out if isinstance(out, (tuple, list)) else (out, None)
            lg = lg.detach().cpu().float()
            assert lg.shape == s["logits"].shape, (name, lg.shape, s["logits"].shape)
            if want("logits"):
                ref = s["logits"][v]
                put(
                    name,
                    "logits",
                    _maxdiff(lg[v], ref),
                    t["logits_atol"] + t["logits_rtol"] * float(ref.abs().max()),
                )
                put(name, "argmax", float((lg[v].argmax(-1) != ref.argmax(-1)).sum()), 0.0)
            if hs is not None and want("hidden"):
                hs = hs.detach().cpu().float()
                for i in range(hs.shape[0]):
                    ref = s["hidden_states"][i][v]
                    put(name, f"hidden[{i}]", _maxdiff(hs[i][v], ref), 1e-4 + 1e-4 * float(ref.abs().max()))
        if (want("loss") or want("grads")) and hasattr(impl, "loss_backward"):
            loss, grads = impl.loss_backward(inp, s["labels"])
            put(
                name,
                "loss",
                abs(float(loss) - float(s["loss"])),
                t["loss_atol"] + 1e-6 * abs(float(s["loss"])),
            )
            if isinstance(grads, dict):
                gn = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values()))
            else:
                gn = float(grads)
            ref = float(s["grad_norm"])
            put(name, "grad_norm", abs(gn - ref), t["grad_norm_rtol"] * ref)
            if isinstance(grads, dict) and want("grads"):
                for n, r in zip(meta["param_names"], s["param_grad_norms"].tolist(), strict=True):
                    if n in grads:
                        put(name, f"|grad {n}|", abs(float(grads[n].double().norm()) - r), 1e-3 * r + 1e-6)
                    else:
                        put(name, f"|grad {n}| missing", float("inf"), 0.0)
                if name == meta["grads_scenario"]:
                    ref = load_file(str(Path(case_dir) / "golden_grads.safetensors"))
                    for n, r in ref.items():
                        if n in grads:
                            put(
                                name,
                                f"grad {n}",
                                float((grads[n].cpu().double() - r.double()).norm()),
                                t["grads_rtol_of_norm"] * float(r.double().norm()) + 1e-7,
                            )
        if want("generate") and "generated" in s:
            pad, n = meta["special_ids"]["pad"], s["generated"].shape[1]
            y = impl.generate(inp, n, None, pad).cpu()
            put(name, "generate", float((y != s["generated"]).sum()), 0.0)
            if "generated_eos" in s:
                y = impl.generate(inp, n, meta["generation"][name]["eos_used"], pad).cpu()
                r = s["generated_eos"]
                m = min(y.shape[1], r.shape[1])
                bad = float((y[:, :m] != r[:, :m]).sum() + (y[:, m:] != pad).sum() + (r[:, m:] != pad).sum())
                put(name, "generate_eos", bad, 0.0)
    if want("train") and hasattr(impl, "train") and scenarios is None:
        b = [(scenario_inputs(scn[k]), scn[k]["labels"]) for k in meta["train"]["batches"]]
        losses, norms = impl.train(b, meta["train"]["steps"])
        put(
            "train",
            "losses",
            _maxdiff(torch.as_tensor(losses).float(), scn["train"]["losses"]),
            t["train_losses_atol"],
        )
        put(
            "train",
            "grad_norms",
            float(
                (
                    (torch.as_tensor(norms).float() - scn["train"]["grad_norms"]).abs()
                    / scn["train"]["grad_norms"]
                ).max()
            ),
            5e-3,
        )
    return rows


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("case", nargs="+")
    ap.add_argument("--impl", required=True)
    ap.add_argument("--only")
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    sys.path.insert(0, ".")
    mod, fn = a.impl.split(":")
    factory = getattr(importlib.import_module(mod), fn)
    bad = 0
    for c in a.case:
        rows = check(c, factory, set(a.only.split(",")) if a.only else None)
        nb = [r for r in rows if not r[4]]
        bad += len(nb)
        worst = max((r[2] for r in rows if r[1] == "logits"), default=0)
        print(f"{c}: {len(rows) - len(nb)} ok, {len(nb)} bad, worst logits diff {worst:.2e}")
        for r in (rows if a.v else nb)[:40]:
            print(f"   {'ok ' if r[4] else 'BAD'} {r[0]}.{r[1]} diff={r[2]:.3e} allowed={r[3]:.3e}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
