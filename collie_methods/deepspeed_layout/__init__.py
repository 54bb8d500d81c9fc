"""The layout `deepspeed`: data parallelism by DeepSpeed's ZeRO.  Importing this imports no torch."""

from collie_methods.deepspeed_layout.plugin import DeepSpeedLayoutPlugin

__all__ = ["DeepSpeedLayoutPlugin"]
