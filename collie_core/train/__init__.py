"""A training run: set-up, loop, evaluation, output."""
