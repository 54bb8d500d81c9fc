"""Checkpoints: tensors in safetensors, everything else in JSON, whole or absent."""
