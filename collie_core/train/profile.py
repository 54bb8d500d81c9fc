"""`collie train --profile N`: a trace of N steps that a browser's trace viewer opens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from collie_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collie_core.run import Run

_WARM_UP = 2  # steps before the trace: they compile, allocate and fill caches


class StepProfiler:
    """A callback that profiles `steps` steps after two of warm-up.

    It writes `profile/trace.json`, or of several processes one `profile/trace_rank_N.json` each.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Start torch's profiler, idle until the warm-up is over."""
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        name = "trace" if run.world_size == 1 else f"trace_rank_{run.rank}"
        path = run.output_dir / "profile" / f"{name}.json"

        def write(profiler: torch.profiler.profile) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            print(f"profile of {self.steps} steps written: {path}", file=sys.stderr)

        plan = schedule(wait=_WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=write)
        self.profiler.start()

    @hookimpl
    def collie_step_end(self) -> None:
        """Tell the profiler that a step is done."""
        self.profiler.step()

    @hookimpl
    def collie_run_end(self) -> None:
        """Stop; a run of too few steps writes what it has."""
        self.profiler.stop()
