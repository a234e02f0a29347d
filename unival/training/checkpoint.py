"""Checkpoints that a crash at any moment leaves whole, and that any number of ranks can load.

    checkpoints/latest                      the name of the newest complete checkpoint
    checkpoints/step-000120/
        state.json                          step, data, optimizer, shapes; length and SHA-256 of
                                            every other file
        rank-00000.safetensors, .json       pieces of masters, moments and average, and which
        rest.safetensors                    buffers, parameters that are not trained
        probe.safetensors                   a small batch, whose loss state.json tells
        model/                              the weights as `from_pretrained` reads them
        model_ema/                          their average, where there is one

A checkpoint is written into a folder beside, by a thread of each rank, from copies of the state.
Rank 0 waits for the others' files, adds its own, brings everything to the disk, renames the folder
and only then moves `latest`. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unival.data.sampler import LoaderState
from unival.files import to_disk, write_json, write_text
from unival.training.adapters import merged_state, save_adapter
from unival.training.engine import Engine
from unival.training.probe import probe_batches, probe_loss
from unival.training.zero_state import (
    Piece,
    create_moments,
    masters_changed,
    moments,
    optimizer_step,
    zero_stage,
)
from unival.vocabulary import Vocabulary

log = logging.getLogger(__name__)

FORMAT = 1
PATIENCE = 3600.0  # seconds that rank 0 waits for the files of the others
# Differences of the stored batch's loss: rounding of another device or number of ranks.
PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


class ResumeError(ValueError):
    """A run folder or checkpoint that cannot be gone on with: names the file and what is wrong."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the one before it is as it was."""


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


@dataclass
class Snapshot:
    """A copy of one rank's state, made between two steps; what is written later is this.

    pieces  tensors by `section/parameter`, sections master, average and the optimizer's
    starts  of each parameter's piece
    rest    (rank 0) buffers and untrained parameters by `section/name`
    """

    pieces: dict[str, Tensor]
    starts: dict[str, int]
    rest: dict[str, Tensor]
    state: dict[str, Any]

    @staticmethod
    def take(engine: Engine, state: dict[str, Any]) -> Snapshot:
        def copy(tensor: Tensor) -> Tensor:
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            return copied.copy_(tensor.detach(), non_blocking=True)

        found, starts, rest = {}, {}, {}
        first = engine.world.rank == 0
        if first or zero_stage(engine.deepspeed) > 0:  # at stage 0 every rank holds everything
            for index, piece in enumerate(engine.pieces):
                starts[piece.name] = piece.start
                found[f"master/{piece.name}"] = copy(piece.master)
                for key, value in moments(engine.deepspeed, piece).items():
                    found[f"{key}/{piece.name}"] = copy(value)
                if engine.average is not None:
                    found[f"average/{piece.name}"] = copy(engine.average.pieces[index])
        if first:
            rest = {f"buffer/{name}": copy(b) for name, b in engine.buffers.items()}
            rest |= {f"frozen/{name}": p for name, p in engine.frozen.items()}
            if engine.average is not None:
                averaged = engine.average.buffers.items()
                rest |= {f"average/{name}": copy(b) for name, b in averaged}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Snapshot(found, starts, rest, state)


@dataclass
class Checkpoint:
    """A checkpoint on the disk, opened for reading."""

    path: Path
    state: dict[str, Any]
    pieces: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    _files: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read what the checkpoint says of itself.

        Raises:
            ResumeError: a file is missing or of another length, or not readable.
        """
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{path}: no complete checkpoint: state.json: {error}") from error
        if state.get("format") != FORMAT:
            raise ResumeError(
                f"{path}: format {state.get('format')!r}; this version reads {FORMAT}"
            )
        for name, told in state["files"].items():
            if not (path / name).is_file():
                raise ResumeError(f"{path}: {name} is missing")
            if (size := (path / name).stat().st_size) != told["bytes"]:
                raise ResumeError(f"{path}: {name} has {size} bytes; written were {told['bytes']}")
        return Checkpoint(path, state, _read_pieces(path, state))

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            ResumeError: names the file.
        """
        for name, told in self.state["files"].items():
            if _digest(self.path / name)["sha256"] != told["sha256"]:
                raise ResumeError(
                    f"{self.path}: {name} is damaged: its SHA-256 is not that written"
                )

    def read(self, section: str, name: str, start: int, count: int) -> Tensor:
        """Elements start..start+count of a flattened parameter, from the files that hold them."""
        out, filled = torch.empty(count, dtype=torch.float32), 0
        for first, length, file in self.pieces[name]:
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                part = self._file(file).get_slice(f"{section}/{name}")
                out[begin - start : end - start] = part[begin - first : end - first]
                filled += end - begin
        if filled != count:
            raise ResumeError(
                f"{self.path}: {section} of {name!r}: {filled} of {count} elements from {start}"
            )
        return out

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, "pt")
        return self._files[name]

    def rest(self) -> dict[str, Tensor]:
        return load_file(self.path / "rest.safetensors")

    def weights(self, section: str) -> dict[str, Tensor]:
        """The whole model's state_dict, of masters or of their average, in float32."""
        shapes, rest = self.state["shapes"], self.rest()
        found = {}
        for name, shape in shapes.items():
            if name in self.pieces:
                found[name] = self.read(section, name, 0, torch.Size(shape).numel()).view(shape)
            else:
                own = rest.get(f"average/{name}") if section == "average" else None
                kept = rest.get(f"frozen/{name}", rest.get(f"buffer/{name}"))
                assert own is not None or kept is not None, name
                found[name] = kept if own is None else own
            if found[name].is_floating_point():
                found[name] = found[name].float()
        return found


def _read_pieces(path: Path, state: dict[str, Any]) -> dict[str, list[tuple[int, int, str]]]:
    """For each trained parameter, first element, length and file of its pieces; all are there."""
    pieces: dict[str, list[tuple[int, int, str]]] = {}
    for rank in range(state["written_by"]):
        told = json.loads((path / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
        for name, (start, count) in told["pieces"].items():
            pieces.setdefault(name, []).append((start, count, f"rank-{rank:05d}.safetensors"))
    for name, found in pieces.items():
        at = 0
        for start, count, file in sorted(found):
            if start != at:
                raise ResumeError(f"{path}: {file}: {name!r} starts at {start}, wanted {at}")
            at += count
        if at != torch.Size(state["shapes"].get(name, [])).numel():
            raise ResumeError(f"{path}: {name!r} has {at} elements of {state['shapes'].get(name)}")
    return pieces


class StageFolder:
    """The folder of one stage: its checkpoints, and its model when it has ended."""

    def __init__(self, run_folder: Path, stage: str) -> None:
        self.path = run_folder / "stages" / stage
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    @property
    def finished(self) -> bool:
        return (self.path / "finished.json").is_file()

    @property
    def begun(self) -> bool:
        return (self.checkpoints / "latest").is_file()

    def latest(self) -> Path | None:
        """The newest complete checkpoint.

        Raises:
            ResumeError: `latest` names one that is not there.
        """
        if not self.begun:
            return None
        name = (self.checkpoints / "latest").read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"step-\d+", name) or not (self.checkpoints / name).is_dir():
            raise ResumeError(f"{self.checkpoints / 'latest'} names {name!r}, which is not there")
        return self.checkpoints / name

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        if not self.checkpoints.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def at(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def clear_unfinished(self) -> None:
        """Remove what an interrupted save left (rank 0, before anything is trained)."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for entry in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finish(self, source: Path) -> None:
        """Copy the model of the last checkpoint and then say that the stage has ended (rank 0)."""
        for name in ("model", "model_ema", "model_adapter", "model_ema_adapter"):
            if (source / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)
                shutil.copytree(source / name, self.path / name)
                for file in (self.path / name).iterdir():
                    to_disk(file)
        write_json(self.path / "finished.json", {"model": "model", "checkpoint": source.name})

    def prune(self, keep: int, keep_best: int, best: str | None) -> None:
        """Remove all but the newest and the best checkpoints (rank 0)."""
        steps = self.steps()
        kept = set(steps[-keep:])
        if best is not None:
            kept |= set(self._ranked(best)[:keep_best])
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.at(step), ignore_errors=True)

    def best(self, best: str) -> Path | None:
        """The checkpoint with the highest score among those that were measured."""
        ranked = self._ranked(best)
        return self.at(ranked[0]) if ranked else None

    def _ranked(self, best: str) -> list[int]:
        """Measured steps, the best first; of equal ones the earlier."""
        scores = {step: self._score(step, best) for step in self.steps()}
        measured = [(-score, step) for step, score in scores.items() if score is not None]
        return [step for _, step in sorted(measured)]

    def _score(self, step: int, best: str) -> float | None:
        path = self.at(step) / "evaluation" / "evaluation.json"
        if not path.is_file():
            return None
        task, _, metric = best.partition("/")
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return metrics.get(task, {}).get(metric)


class Saver:
    """Writes a stage's checkpoints, one at a time, beside the training."""

    def __init__(
        self,
        engine: Engine,
        folder: StageFolder,
        vocabulary: Vocabulary,
        keep: int,
        keep_best: int,
    ) -> None:
        self.engine, self.folder, self.vocabulary = engine, folder, vocabulary
        self.keep, self.keep_best = keep, keep_best
        self.rank, self.world_size = engine.world.rank, engine.world.size
        self.probe = probe_batches(engine)
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        # Ranks of an earlier attempt that still run cannot write into this one's folders.
        token = torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(time.time_ns()))
        dist.broadcast(token, 0, group=engine.world.control)
        self._attempt = int(token)

    def save(self, step: int, data: LoaderState) -> None:
        """Begin to save the state after `step` steps. Waits for the save before it, if need be.

        Raises:
            SaveError: the save before it failed on this rank.
        """
        self.wait()
        engine = self.engine
        state = {
            "format": FORMAT,
            "step": step,
            "data": asdict(data),
            "world_size": self.world_size,
            "zero_stage": zero_stage(engine.deepspeed),
            "written_by": 1 if zero_stage(engine.deepspeed) == 0 else self.world_size,
            "precision": engine.precision,
            "optimizer_step": optimizer_step(engine.deepspeed),
            "scheduler": None if engine.scheduler is None else engine.scheduler.state_dict(),
            "loss_scaler": engine.loss_scaler_state(),
            "shapes": {n: list(s) for n, s in engine.shapes.items()},
            "probe_loss": probe_loss(engine, self.probe),
        }
        snapshot = Snapshot.take(engine, state)
        self._thread = threading.Thread(target=self._run, args=(snapshot,))
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            SaveError: it failed on this rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise SaveError(
                f"{self.folder.checkpoints}: the checkpoint could not be written ({error}); "
                f"{self._good()}"
            ) from error

    @property
    def failed(self) -> bool:
        """The save in flight has failed already."""
        return self.error is not None

    def abandon(self) -> None:
        """Stop waiting for ranks that may be dead; what is written so far is left beside."""
        self._abandoned.set()

    def _good(self) -> str:
        steps = self.folder.steps()
        return f"step {steps[-1]} is the last that is whole" if steps else "there is none before it"

    def _run(self, snapshot: Snapshot) -> None:
        step = snapshot.state["step"]
        beside = self.folder.checkpoints / f"step-{step:06d}-{self._attempt:08x}.tmp"
        try:
            beside.mkdir(exist_ok=True)
            self._write_rank(beside, snapshot)
            if self.rank == 0:
                self._write_whole(beside, snapshot)
                self._publish(beside, step)
        except BaseException as error:
            self.error = error
            log.error("checkpoint of step %d: %s", step, error)
            if self.rank == 0:
                shutil.rmtree(beside, ignore_errors=True)

    def _write_rank(self, beside: Path, snapshot: Snapshot) -> None:
        if not snapshot.pieces:
            return
        stem = beside / f"rank-{self.rank:05d}"
        path = stem.with_suffix(".safetensors")
        save_file(snapshot.pieces, path)
        to_disk(path)
        masters = {n: snapshot.pieces[f"master/{n}"].numel() for n in snapshot.starts}
        # The list comes last: where it is, the tensors are.
        write_json(
            stem.with_suffix(".json"),
            {
                "pieces": {n: [snapshot.starts[n], count] for n, count in masters.items()},
                "sections": sorted({key.partition("/")[0] for key in snapshot.pieces}),
                "file": _digest(path),
            },
        )

    def _write_whole(self, beside: Path, snapshot: Snapshot) -> None:
        """Rank 0's files: what no rank has, the exported model, and the list of everything."""
        save_file(snapshot.rest, beside / "rest.safetensors")
        save_file(self.probe, beside / "probe.safetensors")
        state = snapshot.state
        self._await_others(beside, state["written_by"])
        state["sections"] = json.loads((beside / "rank-00000.json").read_text())["sections"]
        checkpoint = Checkpoint(beside, state, _read_pieces(beside, state))
        sections = {"model": "master", "model_ema": "average"}
        for name, section in sections.items():
            if section in state["sections"]:
                weights, adapter = checkpoint.weights(section), self.engine.stage.adapter
                if adapter is not None:
                    save_adapter(weights, adapter, beside / f"{name}_adapter")
                    weights = merged_state(weights, adapter)
                self._export(beside / name, weights)
        state["files"] = {}
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                to_disk(path)
                name = path.relative_to(beside).as_posix()
                told = beside / f"{path.stem}.json"
                known = path.match("rank-*.safetensors")
                state["files"][name] = (
                    json.loads(told.read_text())["file"] if known else _digest(path)
                )
        write_json(beside / "state.json", state)

    def _await_others(self, beside: Path, ranks: int) -> None:
        deadline = time.monotonic() + PATIENCE
        waited = [beside / f"rank-{rank:05d}.json" for rank in range(ranks)]
        while missing := [path for path in waited if not path.is_file()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{missing[0]} was not written within {PATIENCE:.0f} s")
            if self._abandoned.wait(0.02):
                raise InterruptedError("the run has ended before all ranks had written")

    def _export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = type(self.engine.model.config).from_dict(self.engine.model.config.to_dict())
        config.architectures, config.dtype = [type(self.engine.model).__name__], "float32"
        config.save_pretrained(folder)
        self.engine.model.generation_config.save_pretrained(folder)
        self.vocabulary.tokenizer.save_pretrained(folder)

    def _publish(self, beside: Path, step: int) -> None:
        to_disk(beside)
        target = self.folder.at(step)
        if target.exists():  # a rollback comes by the same step again
            shutil.rmtree(target)
        os.rename(beside, target)
        to_disk(target.parent)
        write_text(self.folder.checkpoints / "latest", target.name)
        self.folder.prune(self.keep, self.keep_best, self.engine.stage.best)


def restore(engine: Engine, folder: StageFolder, saver: Saver) -> tuple[int, LoaderState] | None:
    """Load the newest checkpoint into an engine of any number of ranks.

    Returns:
        The steps it has seen and the samples consumed by then; None where there is no checkpoint.

    Raises:
        ResumeError: on every rank, if it is damaged, of another model or ZeRO layout, or computes
            another loss than it did when it was saved.
    """
    path = folder.latest()
    if path is None:
        return None
    checkpoint = _agreed(engine, lambda: _opened(engine, path))
    _agreed(engine, lambda: _load(engine, checkpoint))
    masters_changed(engine.deepspeed)
    _agreed(engine, lambda: _check_probe(engine, checkpoint))
    state = checkpoint.state
    log.info("resumed %s after step %d", folder.path.name, state["step"])
    return int(state["step"]), LoaderState(**state["data"])


def _agreed(engine: Engine, action: Callable[[], Any]) -> Any:
    """Do something on every rank; if it fails on one, all stop with an error."""
    error, done = None, None
    try:
        done = action()
    except (ResumeError, SafetensorError, OSError, KeyError) as caught:
        error = caught
    failed = torch.tensor(float(error is not None))
    dist.all_reduce(failed, group=engine.world.control)
    if isinstance(error, ResumeError):
        raise error
    if error is not None:
        raise ResumeError(f"the checkpoint cannot be read: {error}") from error
    if failed > 0:
        raise ResumeError("another rank refused the checkpoint; its message says why")
    return done


def _opened(engine: Engine, path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    if engine.world.rank == 0:
        checkpoint.verify()
    told = checkpoint.state["shapes"]
    own = {name: list(shape) for name, shape in engine.shapes.items()}
    for name in [*own, *told]:
        if own.get(name) != told.get(name):
            raise ResumeError(
                f"{path}: of another model: {name!r} is {told.get(name)} there, "
                f"{own.get(name)} in this run"
            )
    trained = {name for p, name in engine.names.items() if p.requires_grad}
    if other := trained ^ checkpoint.pieces.keys():
        raise ResumeError(f"{path}: {min(other)!r} is trained in one of run and checkpoint only")
    if checkpoint.state["precision"] != engine.precision:
        raise ResumeError(
            f"{path}: trained in {checkpoint.state['precision']}, this run in {engine.precision}"
        )
    if (engine.average is not None) != ("average" in checkpoint.state["sections"]):
        raise ResumeError(f"{path}: ema_decay is on in one of run and checkpoint only")
    return checkpoint


@torch.no_grad()
def _load(engine: Engine, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    keys = [name for name in state["sections"] if name not in ("master", "average")]
    if keys:
        create_moments(engine.deepspeed, engine.pieces, keys, state["optimizer_step"])
    for index, piece in enumerate(engine.pieces):
        for section, target in _targets(engine, piece, index):
            count = piece.master.numel()
            target.copy_(checkpoint.read(section, piece.name, piece.start, count))
    rest = checkpoint.rest()
    for name, buffer in engine.buffers.items():
        buffer.copy_(rest[f"buffer/{name}"])
    if engine.average is not None:
        for name, averaged in engine.average.buffers.items():
            averaged.copy_(rest[f"average/{name}"])
    if engine.scheduler is not None and state["scheduler"] is not None:
        engine.scheduler.load_state_dict(state["scheduler"])
    engine.set_loss_scaler_state(state["loss_scaler"])


def _targets(engine: Engine, piece: Piece, index: int) -> Iterator[tuple[str, Tensor]]:
    yield "master", piece.master
    yield from moments(engine.deepspeed, piece).items()
    if engine.average is not None:
        yield "average", engine.average.pieces[index]


def _check_probe(engine: Engine, checkpoint: Checkpoint) -> None:
    told = checkpoint.state["probe_loss"]
    found = probe_loss(engine, load_file(checkpoint.path / "probe.safetensors"))
    tolerance = PROBE_TOLERANCE[engine.precision]
    if not abs(found - told) <= tolerance * abs(told):
        raise ResumeError(
            f"{checkpoint.path}: the loss of its stored batch is {found:.6f}, it was {told:.6f} "
            "when it was saved: this is not the model that was trained"
        )
