"""The monitor `csv`: every figure of a run in `metrics.csv`."""

from collie_monitors.csv_monitor.monitor import Csv

__all__ = ["Csv"]
