"""An instruction data set from what every Python installation carries: the standard library's docstrings.

Sources are parsed, never imported.  A record asks for a function, class or method and answers with the
first paragraphs of its docstring.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = (
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
)
QUESTIONS = {
    "function": "What does {name} do?",
    "class": "What is {name}?",
    "module": "What is the module {name} for?",
}


def standard_library() -> Path:
    """The folder of the standard library's sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def documented(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, docstring) of everything documented in one source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                dotted = f"{name}.{child.name}"
                text = ast.get_docstring(child)
                if text:
                    yield ("class" if isinstance(child, ast.ClassDef) else "function"), dotted, text
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, dotted)

    text = ast.get_docstring(tree)
    if text:
        yield "module", module, text
    yield from walk(tree, module)


def first_paragraphs(text: str, limit: int = 400) -> str:
    """Whole paragraphs of a docstring, as one line each, up to about `limit` characters."""
    kept = ""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        if kept and len(kept) + len(line) > limit:
            break
        kept = f"{kept}\n{line}" if kept else line
    return kept[: 2 * limit]


def records() -> list[dict[str, str]]:
    """Every record, in an order that depends on the sources alone; a docstring seen twice is kept once."""
    root, seen, found = standard_library(), set(), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in SKIPPED for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for kind, name, text in documented(path, module):
            answer = first_paragraphs(text)
            if len(answer) >= 20 and answer not in seen:
                seen.add(answer)
                question = QUESTIONS[kind].format(name=name.replace(".__init__", ""))
                found.append({"input": f"Question: {question}\nAnswer:", "output": f" {answer}"})
    return found


def write(folder: Path, held_out: float = 0.05, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = records()
    random.Random(seed).shuffle(everything)
    count = int(len(everything) * held_out)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, part in zip(paths, (everything[count:], everything[:count]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
    return paths
