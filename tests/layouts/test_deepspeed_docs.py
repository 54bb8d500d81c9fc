"""docs/deepspeed.md: its config is accepted, and its defaults are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from collie_core import CollieConfig
from collie_core.train.setup import check_run
from collie_methods.deepspeed_layout import DeepSpeedLayoutPlugin

pytest.importorskip("deepspeed")
TEXT = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text()


def test_the_config_is_accepted() -> None:
    [snippet] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    check_run(CollieConfig(model={"path": "model"}, data={"train": "data"}, **yaml.safe_load(snippet)))


def test_options_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| `?(\w+)`? \|$", TEXT, re.MULTILINE)
    defaults = vars(DeepSpeedLayoutPlugin.Options())
    assert dict(rows) == {key: "none" if value is None else str(value) for key, value in defaults.items()}
