"""Layouts: where the model lives and how a step runs."""
