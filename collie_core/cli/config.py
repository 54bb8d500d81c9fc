"""`collie config check|show|schema`"""

from __future__ import annotations

import argparse
import json
import sys

from collie_core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("check", "find every mistake that needs no data and no device"),
        ("show", "print the config with every default filled in"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("config", help="YAML file")
        action.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "check":
            action.add_argument(
                "--explain",
                action="store_true",
                help="say what each process holds, or why the combination is refused and what works instead",
            )
    text = "print a JSON schema of the config, with the options of the installed plugins"
    actions.add_parser("schema", help=text, description=text)


def run(args: argparse.Namespace) -> int:
    """Check, show, or print the schema."""
    if args.action == "schema":
        from collie_core.config.json_schema import full_schema

        print(json.dumps(full_schema(), indent=2))
        return 0
    from collie_core.config.load import load_config

    if args.action == "check" and args.explain:
        from collie_core.train.explain import explain

        explanation = explain(args.config, args.overrides)
        print(json.dumps(explanation.to_mapping()) if args.json else "\n".join(explanation.lines()))
        return UserError.exit_status if explanation.refused else 0
    config = load_config(args.config, args.overrides)
    if args.action == "check":
        from collie_core.train.setup import check_run

        found = check_run(config)
        if args.json:
            print(json.dumps({"config": args.config, "plugins": found}))
        else:
            print(f"{args.config}: no mistake found ({', '.join(found)})", file=sys.stderr)
        return 0
    if args.json:
        print(json.dumps(config.to_mapping(), indent=2))
    else:
        import yaml

        print(yaml.safe_dump(config.to_mapping(), sort_keys=False, allow_unicode=True), end="")
    return 0
