"""Processes of a run: which one this is, how they meet, are started and stopped, and learn of a death."""

from __future__ import annotations

from collie_core.launch.world import (
    World,
    close_process_group,
    current_world,
    local_device,
    open_process_group,
)

__all__ = ["World", "close_process_group", "current_world", "local_device", "open_process_group"]
