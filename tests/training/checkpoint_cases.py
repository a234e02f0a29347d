"""What a rank does in the tests of checkpoints."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

from engine_cases import build, state_of, steps_on
from torch import Tensor

from unival.data.sampler import LoaderState
from unival.training.checkpoint import ResumeError, SaveError, Saver, StageFolder, restore
from unival.training.engine import Engine, StepResult, init_distributed
from unival.training.options import Run
from unival.training.zero_state import moments, optimizer_step
from unival.vocabulary import Vocabulary


def begin(run: Run) -> tuple[Engine, StageFolder, Saver]:
    world = init_distributed()
    engine = build(run, world)
    place = StageFolder(Path(run.output), run.stages[0].name)
    if world.rank == 0:
        place.clear_unfinished()
    world.barrier()
    vocabulary = Vocabulary(run.text_order)
    return engine, place, Saver(engine, place, vocabulary, run.keep, run.keep_best)


def train_save_train(run: Run, before: int, after: int) -> tuple[list[StepResult], dict]:
    """Steps, a checkpoint, steps; results of the latter and the state at the end."""
    engine, _, saver = begin(run)
    steps_on(engine, 1, before)
    saver.save(before, LoaderState(run.seed, {"qa": 4 * before}))
    results = steps_on(engine, before + 1, after)  # while the checkpoint is written
    saver.wait()
    engine.world.barrier()
    return results, state_of(engine)


def resume_train(run: Run, count: int) -> tuple[list[StepResult], dict]:
    engine, place, saver = begin(run)
    found = restore(engine, place, saver)
    assert found is not None
    done, data = found
    assert data == LoaderState(run.seed, {"qa": 4 * done})
    return steps_on(engine, done + 1, count), state_of(engine)


def resume_moments(run: Run) -> tuple[float, dict[str, Tensor]]:
    engine, place, saver = begin(run)
    restore(engine, place, saver)
    found = {
        f"{key}/{piece.name}": value.clone()
        for piece in engine.pieces
        for key, value in moments(engine.deepspeed, piece).items()
    }
    return optimizer_step(engine.deepspeed), found


def resume_refused(run: Run) -> str | None:
    """The message of the refusal; None if the checkpoint was taken."""
    engine, place, saver = begin(run)
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
    engine, place, saver = begin(run)
    steps_on(engine, 1, 1)
    saver.save(1, LoaderState(run.seed, {"qa": 4}))
    saver.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails
    size = (place.latest() / "rank-00000.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    steps_on(engine, 2, 1)
    saver.save(2, LoaderState(run.seed, {"qa": 8}))
    try:
        saver.wait()
    except SaveError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "was written"
