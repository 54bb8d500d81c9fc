"""docs/config.md is what the generator writes, and names every key."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "config_table.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page, "run `make docs`"
    assert "`train.micro_batch_size`" in page and "`optimizer.param_groups[].lr`" in page
