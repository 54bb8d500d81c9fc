"""Optimizers: what every one of them shares, and those of torch."""
