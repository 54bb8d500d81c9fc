"""How long `collie plugins` takes with many distributions installed: whole processes, nothing imported.

Writes 300 dist-info folders into a temporary folder, 40 of them with entry points of collie, puts it on the
path of the running environment and measures the command.  Usage: python benchmarks/plugin_discovery.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DISTRIBUTIONS, WITH_PLUGINS, RUNS = 300, 40, 10
TARGET_SECONDS = 0.25
GROUPS = ("models", "optimizers", "monitors", "adapters", "layouts")
#: the long description that a usual distribution carries in its metadata
DESCRIPTION = "\n".join(["A usual long description, as real distributions have one."] * 100)


def write_distributions(site: Path) -> None:
    """The dist-info folders; every eighth or so has two plugins whose modules do not exist."""
    for number in range(DISTRIBUTIONS):
        info = site / f"dist_{number}-1.{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: dist-{number}\nVersion: 1.{number}\n"
            f"Summary: Distribution {number}\nRequires-Dist: collie-core>=0.1,<0.2\n\n{DESCRIPTION}\n"
        )
        (info / "RECORD").write_text(f"dist_{number}/__init__.py,,\n")
        scripts = f"[console_scripts]\ntool-{number} = dist_{number}:main\n"
        group = GROUPS[number % len(GROUPS)]
        plugins = f"[collie.{group}]\na{number} = dist_{number}:A\nb{number} = dist_{number}:B\n"
        (info / "entry_points.txt").write_text(plugins if number < WITH_PLUGINS else scripts)


def run(code: str, site: Path) -> tuple[float, str]:
    """Seconds and output of a whole process."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - start, result.stdout


def main() -> int:
    """Print the table; 1 where the target is missed."""
    command = "import sys; from collie_core.cli.main import main; "
    listing = command + "sys.exit(main(['plugins', '--json']))"
    proof = command + "main(['plugins']); assert 'torch' not in sys.modules"
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        write_distributions(site)
        _, output = run(listing, site)  # also compiles the core's modules
        generated = [entry for entry in json.loads(output) if entry["distribution"].startswith("dist-")]
        assert len(generated) == 2 * WITH_PLUGINS, len(generated)
        run(proof, site)
        seconds = [run(listing, site)[0] for _ in range(RUNS)]
        bare = [run("pass", site)[0] for _ in range(RUNS)]
    median = statistics.median(seconds)
    print(f"{'':32}  median s  slowest s")
    print(f"{'python -c pass':32}  {statistics.median(bare):8.3f}  {max(bare):9.3f}")
    print(f"{f'collie plugins, {DISTRIBUTIONS} distributions':32}  {median:8.3f}  {max(seconds):9.3f}")
    verdict = "met" if median < TARGET_SECONDS else "missed"
    print(f"target < {TARGET_SECONDS} s: {verdict}; torch was not imported")
    return 0 if median < TARGET_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
