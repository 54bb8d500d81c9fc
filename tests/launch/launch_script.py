"""launch_script.py PROCESSES STOP_GRACE SCRIPT ARGUMENTS...: the script as so many processes."""

from __future__ import annotations

import sys

from collie_core.launch.launcher import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[3:], int(sys.argv[1]), float(sys.argv[2])))
