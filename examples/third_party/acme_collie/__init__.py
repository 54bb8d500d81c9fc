"""Acme's parts for CoLLiE: a model family, an optimizer and a monitor.  Found through pyproject.toml."""
