"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from unival.data.samples import make_samples


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and shards of the samples; only to be read."""
    folder = tmp_path_factory.mktemp("data")
    make_samples(Path(__file__).parents[2] / "samples", folder)
    return folder
