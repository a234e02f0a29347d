"""What a rank does in the tests of checkpoints."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

from engine_cases import build, state_of
from torch import Tensor

from unival.training.batches import BatchMaker
from unival.training.checkpoint import ResumeError, SaveError, Saver, StageFolder, restore
from unival.training.engine import Engine, StepResult, init_distributed
from unival.training.options import Run
from unival.training.zero_state import moments, optimizer_step
from unival.vocabulary import Vocabulary


def begin(run: Run) -> tuple[Engine, BatchMaker, StageFolder, Saver]:
    world = init_distributed()
    engine = build(run, world)
    vocabulary = Vocabulary(run.text_order)
    maker = BatchMaker(run, run.stages[0], vocabulary, world.rank, world.size)
    place = StageFolder(Path(run.output), run.stages[0].name)
    if world.rank == 0:
        place.clear_unfinished()
    world.barrier()
    return engine, maker, place, Saver(engine, place, vocabulary, run.keep, run.keep_best)


def steps(engine: Engine, maker: BatchMaker, first: int, count: int) -> list[StepResult]:
    found = [engine.step(maker.step(step), step) for step in range(first, first + count)]
    assert all(result.finite for result in found)
    return found


def train_save_train(run: Run, before: int, after: int) -> tuple[list[StepResult], dict]:
    """Steps, a checkpoint, steps; results of the latter and the state at the end."""
    engine, maker, _, saver = begin(run)
    steps(engine, maker, 1, before)
    saver.save(before, maker.state)
    results = steps(engine, maker, before + 1, after)  # while the checkpoint is written
    saver.wait()
    engine.world.barrier()
    return results, state_of(engine)


def resume_train(run: Run, count: int) -> tuple[list[StepResult], dict]:
    engine, maker, place, saver = begin(run)
    found = restore(engine, place, saver)
    assert found is not None
    done, maker.state = found
    return steps(engine, maker, done + 1, count), state_of(engine)


def resume_moments(run: Run) -> tuple[float, dict[str, Tensor]]:
    engine, _, place, saver = begin(run)
    restore(engine, place, saver)
    found = {
        f"{key}/{piece.name}": value.clone()
        for piece in engine.pieces
        for key, value in moments(engine.deepspeed, piece).items()
    }
    return optimizer_step(engine.deepspeed), found


def resume_refused(run: Run) -> str | None:
    """The message of the refusal; None if the checkpoint was taken."""
    engine, _, place, saver = begin(run)
    before = state_of(engine)
    try:
        restore(engine, place, saver)
    except ResumeError as error:
        if "stored batch" not in str(error) and "another rank" not in str(error):
            after = state_of(engine)
            assert all(after[name][0][1].equal(before[name][0][1]) for name in before)
        return str(error)
    return None


def save_on_a_full_disk(run: Run) -> str:
    """A checkpoint, then one under a limit of the size of files; what the second's error says."""
    engine, maker, place, saver = begin(run)
    steps(engine, maker, 1, 1)
    saver.save(1, maker.state)
    saver.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails
    size = (place.latest() / "rank-00000.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    steps(engine, maker, 2, 1)
    saver.save(2, maker.state)
    try:
        saver.wait()
    except SaveError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "was written"
