"""The monitor `wandb`: a run in Weights & Biases."""

from collie_monitors.wandb_monitor.monitor import WandB

__all__ = ["WandB"]
