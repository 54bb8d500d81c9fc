"""`collie doctor`: what a report of a problem needs, and what is wrong with the installation."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 where something is wrong."""
    found = findings()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, version in found["versions"].items():
            print(f"{name:16} {version}")
        for name, value in found["device"].items():
            print(f"{name:16} {value}")
        for name, value in found["operations"].items():
            print(f"{name:16} {value}")
        for problem in found["problems"]:
            print(f"problem: {problem}")
        if not found["problems"]:
            print("no problem found", file=sys.stderr)
    return 1 if found["problems"] else 0


def findings() -> dict[str, Any]:
    """Versions, device, the operations that would be used, and problems."""
    import torch

    from collie_core.ops import select_ops
    from collie_core.registry import LoadedPlugin, Registry, namespace_blockers
    from collie_core.versions import versions

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    facts = {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}
    if cuda:
        facts["device memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    problems = [
        item.problem
        for item in Registry().check()
        if not isinstance(item, LoadedPlugin) and item.status != "off"
    ]
    problems += namespace_blockers()
    if not any(info.name == "native" for info in Registry().plugins()):
        problems.append("collie-core's own plugins are not registered; run: pip install -e ./collie_core")
    operations = select_ops(
        attention="auto", cross_entropy="auto", use_flash="auto", device=device
    ).describe()
    return {"versions": versions(), "device": facts, "operations": operations, "problems": problems}
