"""Deterministic matrix products on CUDA must be asked for before the first one."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
