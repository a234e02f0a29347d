"""Searching for answers: beam search, constraints, boxes."""
