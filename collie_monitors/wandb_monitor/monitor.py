"""One run in Weights & Biases for one training run, resumed or not, online or offline."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from collie_core.hookspecs import hookimpl
from collie_core.monitors.metrics_file import MetricsFile
from collie_monitors.wandb_monitor.record import Record

if TYPE_CHECKING:
    import wandb

    from collie_core.run import Run

Mode = Literal["online", "offline", "disabled"]
PERPLEXITY, BEST_PERPLEXITY = "perplexity/perplexity", "perplexity/best"


class WandB:
    """Weights & Biases: figures, texts, config and summary of a run."""

    collie_api = 1

    @dataclass(frozen=True)
    class Options:
        """As in `wandb.init`; null leaves the choice to W&B (WANDB_PROJECT and the like).

        run_name: null means the name of output_dir.
        mode: null means WANDB_MODE, or else online, or offline where no API key is or no server answers.
        init_timeout: how many seconds the server has to answer when the run starts.
        """

        project: str | None = None
        run_name: str | None = None
        entity: str | None = None
        group: str | None = None
        tags: tuple[str, ...] = ()
        notes: str | None = None
        mode: Mode | None = None
        init_timeout: float = 30.0

    def __init__(self, options: Options) -> None:
        self._options = options

    @hookimpl
    def collie_check(self) -> list[str]:
        """The package must be there (an import proves nothing: any folder `wandb` can be one), and a key."""
        try:
            metadata.version("wandb")
        except metadata.PackageNotFoundError:
            return ["the package wandb is not installed; pip install wandb"]
        if self._options.mode == "online" and not _has_key():
            return ["mode is online, but no API key is configured; run wandb login, or set WANDB_API_KEY"]
        return []

    @hookimpl
    def collie_monitor(self, run: Run) -> WandBMonitor:
        """The monitor; in a resumed run the W&B run goes on."""
        return WandBMonitor(run, self._options)


class WandBMonitor:
    """Logs to one W&B run.

    A killed process loses what W&B had not yet written or sent, and W&B takes no step twice.  So a resumed
    run learns which steps W&B holds, adds those that it lacks from `metrics.jsonl`, and skips those it has.
    """

    def __init__(self, run: Run, options: WandB.Options) -> None:
        folder = run.output_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._record = Record.of_run(folder, resumed=run.step > 0)
        self._wandb_run = _start(run, options, self._record.id)
        if self._wandb_run.offline:
            self._logged = self._record.steps_in_earlier_files(run.step)
        else:
            self._logged = self._wandb_run.starting_step - 1  # the server's last step; -1 for a new run
        self._record.begin(self._logged, Path(self._wandb_run.dir).parent.name)
        self._step = run.step
        self._best_perplexity = math.inf
        for line in MetricsFile(run.output_dir / "metrics.jsonl").read():
            step = int(line["step"] or 0)
            figures = {key: math.nan if value is None else value for key, value in line.items()}
            if self._logged < step <= run.step:
                self.log(step, figures)
            elif step <= run.step:
                self._best_perplexity = min(self._best_perplexity, figures.get(PERPLEXITY, math.inf))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add figures to the row of a step; those that come too late for it show in the summary alone."""
        figures = {key: value for key, value in metrics.items() if key != "step"}
        self._step = max(self._step, step)
        self._best_perplexity = min(self._best_perplexity, figures.get(PERPLEXITY, math.inf))
        if step > self._logged:
            self._wandb_run.log(figures, step=step)
        else:
            self._wandb_run.summary.update(figures)

    def text(self, step: int, key: str, value: str) -> None:
        """Add a text to the row of a step."""
        if step > self._logged:
            self._wandb_run.log({key: value}, step=step)

    def close(self, error: BaseException | None) -> None:
        """Write the summary and mark the run as finished, or failed."""
        if math.isfinite(self._best_perplexity):
            self._wandb_run.summary[BEST_PERPLEXITY] = self._best_perplexity
        self._wandb_run.finish(exit_code=0 if error is None else 1)
        self._record.end(max(self._step, self._logged))


def _start(run: Run, options: WandB.Options, run_id: str) -> wandb.Run:
    """The W&B run `run_id`, begun or continued, never asking the user; a line on stderr says where it is."""
    import wandb

    def begin(mode: Mode | None, why: str = "") -> wandb.Run:
        wandb_run = wandb.init(
            id=run_id,
            resume="allow",
            project=options.project,
            entity=options.entity,
            name=options.run_name or run.output_dir.resolve().name,
            group=options.group,
            tags=options.tags or None,
            notes=options.notes,
            dir=run.output_dir,
            config=run.config.to_mapping(),
            allow_val_change=True,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=options.init_timeout),
        )
        if wandb_run.offline:
            where = f"offline{why}; upload it with: wandb sync {run.output_dir}/wandb/offline-run-*-{run_id}"
        else:
            where = wandb_run.url or "disabled"
        print(f"wandb: {where}", file=sys.stderr)
        return wandb_run

    configured = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if options.mode is None and configured == "online" and not _has_key():
        return begin("offline", ", since no API key is configured")
    try:
        return begin(options.mode)
    except wandb.errors.CommError as error:
        if options.mode is not None:
            raise
        wandb.teardown()  # the failed attempt still holds the run's id
        cause = str(error).splitlines()[0]
        return begin("offline", f", since the server does not answer ({cause})")


def _has_key() -> bool:
    import wandb

    return wandb.login(prompt=False, verify=False)
