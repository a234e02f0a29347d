"""Conversion between the original checkpoints and this project's safetensors."""
