"""`collie generate M --prompt TEXT`"""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("model", metavar="M", help="model folder, hub id, run folder or checkpoint")
    parser.add_argument("--provider", metavar="NAME", help="model plugin; default: M's own")
    parser.add_argument("--revision", metavar="R", help="of a hub id")
    parser.add_argument("--prompt", required=True, help="text to go on from; - reads it from standard input")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the chat template as a user's message"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="chat template, as data.template names it; implies --chat"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="print prompt, answer and token counts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the answer alone."""
    import torch

    from collie_core.data.prompts import chat_prompt_tokens, prompt_tokens
    from collie_core.data.templates import find_template
    from collie_core.errors import UserError
    from collie_core.models.auto import AutoModelForCausalLM, AutoTokenizer

    which = {"provider": args.provider, "revision": args.revision}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **which)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), use_flash="auto", **which
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = None
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.chat or args.template:
        family = model.origin.provider.template if model.origin else None
        template = find_template(args.template, tokenizer, family)
        if template.chat is None:
            raise UserError(f"{args.model}: --chat needs a chat template: name one with --template")
        ids = chat_prompt_tokens([{"role": "user", "content": prompt}], tokenizer, template)
        ends = getattr(tokenizer, "stop_token_ids", None)  # of the chat format, which models may not state
    else:
        ids = prompt_tokens(prompt, tokenizer)
    if not ids:
        raise UserError("--prompt: expected some text, got none")
    output = model.generate(
        torch.tensor([ids]),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or 1.0,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=[*ends, tokenizer.eos_token_id] if ends else None,
        stop_strings=args.stop or None,
        tokenizer=tokenizer if args.stop else None,
        seed=args.seed,
    )
    new = output[0, len(ids) :].tolist()
    said = new[:-1] if ends and new and new[-1] in ends else new
    answer = tokenizer.decode(said, skip_special_tokens=True)
    for stop in args.stop:
        answer = answer.partition(stop)[0]
    if args.json:
        print(
            json.dumps(
                {"prompt": prompt, "answer": answer, "prompt_tokens": len(ids), "new_tokens": len(new)}
            )
        )
    else:
        print(answer)
    return 0
