"""Attention with untied positions, relative bias and head scaling."""
