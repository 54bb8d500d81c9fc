"""The monitor `tensorboard`: event files that TensorBoard shows."""

from collie_monitors.tensorboard_monitor.monitor import TensorBoard

__all__ = ["TensorBoard"]
