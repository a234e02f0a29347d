"""Checkpoints: other numbers of ranks go on from them, and nothing damaged is ever loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoint_cases as cases
import engine_cases
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from unival.model.loading import load_model
from unival.training.checkpoint import Checkpoint, ResumeError, StageFolder


def small(folder: Path, stage: int, **fields):
    run = engine_cases.small_run(folder / "run", {"ema_decay": 0.8}, **fields)
    return engine_cases.stage_zero(run, stage)


class Saved(dict):
    """By ZeRO stage a folder with a checkpoint of two ranks after 2 steps, and the states of a run
    of two ranks that goes on from there in one process for 2 more."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, stage: int):
        folder = self.factory.mktemp(f"zero{stage}")
        run = small(folder, stage)
        self[stage] = (folder, on_ranks(folder, 2, cases.train_save_train, run, 2, 2))
        return self[stage]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory)


def whole(found):
    return engine_cases.whole([state for _, state in found])


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if tolerance:
            torch.testing.assert_close(
                found[name], values, rtol=tolerance, atol=tolerance / 100, msg=name
            )
        else:
            assert found[name].equal(values), name


WORLDS = [(1, 2), (3, 2), (1, 1)]
WORLDS += [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (2, 4), (3, 1), (3, 4))]


@pytest.mark.parametrize(("stage", "world"), WORLDS)
def test_a_run_goes_on_with_any_number_of_ranks(tmp_path, saved, stage, world):
    """Bit for bit with the same number; else to the rounding of sums in another order."""
    folder, expected = saved[stage]
    shutil.copytree(folder / "run", tmp_path / "run")
    run = small(tmp_path, stage)
    found = on_ranks(tmp_path / "logs", world, cases.resume_train, run, 2)
    tolerance = 0 if world == 2 else 1e-5
    losses = [result.loss for result in expected[0][0]]
    for results, _ in found:
        assert [r.loss for r in results] == pytest.approx(losses, rel=tolerance, abs=0)
    assert_close(whole(found), whole(expected), tolerance)


@pytest.mark.parametrize(
    ("written", "read"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (2, 3))), (3, 1)],
)
def test_a_checkpoint_of_one_stage_is_read_by_another(tmp_path, saved, written, read):
    folder, expected = saved[written]
    shutil.copytree(folder / "run", tmp_path / "run")
    found = on_ranks(tmp_path / "logs", 2, cases.resume_train, small(tmp_path, read), 2)
    assert_close(whole(found), whole(expected), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_masters_of_bf16_go_on_bit_for_bit(tmp_path, stage):
    run = small(tmp_path, stage, precision="bf16")
    expected = on_ranks(tmp_path / "logs", 2, cases.train_save_train, run, 1, 1)
    found = on_ranks(tmp_path / "logs", 2, cases.resume_train, run, 1)
    assert [r[0].loss for r, _ in found] == [r[0].loss for r, _ in expected]
    assert_close(whole(found), whole(expected), 0)


@pytest.mark.slow
def test_stage_3_in_many_groups_without_whole_parameters_goes_on_bit_for_bit(tmp_path):
    """Its flat buffers are then many, and the smallest parameters are cut and padded too."""
    zero = {"stage": 3, "sub_group_size": 100_000, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run = small(tmp_path, 3)
    run = replace(run, deepspeed=replace(run.deepspeed, config=str(tmp_path / "ds.json")))
    expected = on_ranks(tmp_path / "logs", 2, cases.train_save_train, run, 2, 2)
    found = on_ranks(tmp_path / "logs", 2, cases.resume_train, run, 2)
    assert_close(whole(found), whole(expected), 0)
    one = on_ranks(tmp_path / "logs", 1, cases.resume_train, small(tmp_path, 2), 2)
    assert_close(whole(one), whole(expected), 1e-5)


def test_moments_and_their_count_are_those_of_the_run(tmp_path, saved):
    """Without them the resumed losses above would be nearly right all the same."""
    folder, _ = saved[1]
    shutil.copytree(folder / "run", tmp_path / "run")
    found = on_ranks(tmp_path / "logs", 1, cases.resume_moments, small(tmp_path, 1))
    ((step, moments),) = found
    assert step == 2
    checkpoint = Checkpoint.open(StageFolder(tmp_path / "run", "one").latest())
    for name in checkpoint.pieces:
        for key in ("exp_avg", "exp_avg_sq"):
            count = torch.Size(checkpoint.state["shapes"][name]).numel()
            assert moments[f"{key}/{name}"].equal(checkpoint.read(key, name, 0, count))
    assert any(float(value.abs().max()) > 0 for value in moments.values())


def test_the_export_is_the_model_and_its_average(saved):
    folder, _ = saved[3]
    path = StageFolder(folder / "run", "one").latest()
    checkpoint = Checkpoint.open(path)
    for name, section in (("model", "master"), ("model_ema", "average")):
        state = load_model(path / name).state_dict()
        for key, start in (
            ("encoder.image_proj.weight", 0),
            ("decoder.layers.0.ffn.fc1.weight", 5),
        ):
            flat = state[key].flatten()[start : start + 7]
            assert flat.equal(checkpoint.read(section, key, start, 7))
    plain = load_model(path / "model").state_dict()["encoder.image_proj.weight"]
    mean = load_model(path / "model_ema").state_dict()["encoder.image_proj.weight"]
    assert not plain.equal(mean)
    # Not trained in this stage (batch norm is frozen, there are no sounds), but handed on.
    assert "encoder.audio_proj.weight" in load_model(path / "model").state_dict()


def damage(kind: str, path: Path) -> None:
    shard = path / "rank-00001.safetensors"
    if kind == "missing shard":
        shard.unlink()
    elif kind == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "flipped bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0x10
        shard.write_bytes(content)
    elif kind == "flipped bit in the list":
        listed = path / "rank-00000.json"
        listed.write_bytes(listed.read_bytes().replace(b"0", b"1", 1))
    elif kind == "half a state.json":
        state = path / "state.json"
        state.write_bytes(state.read_bytes()[:300])
    elif kind == "no state.json":
        (path / "state.json").unlink()
    elif kind == "lost":
        shutil.rmtree(path)
    elif kind == "another model":  # whole files, but weights that are not those that were trained
        tensors = load_file(shard)
        for name in tensors:
            if name.startswith("master/"):
                tensors[name] += 0.5
        save_file(tensors, shard)
        state = json.loads((path / "state.json").read_text())
        import hashlib

        content = shard.read_bytes()
        told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        state["files"][shard.name] = told
        (path / "state.json").write_text(json.dumps(state))
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing shard", "rank-00001.safetensors is missing"),
        ("cut shard", "rank-00001.safetensors has .* bytes; written were"),
        ("flipped bit", "rank-00001.safetensors is damaged: its SHA-256"),
        ("flipped bit in the list", "rank-00000.json|starts at|has .* elements of"),
        ("half a state.json", "no complete checkpoint: state.json"),
        ("no state.json", "no complete checkpoint: state.json"),
        ("lost", "latest' names|latest names"),
        ("another model", "the loss of its stored batch is .* this is not the model"),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank(tmp_path, saved, kind, message):
    folder, _ = saved[1]
    shutil.copytree(folder / "run", tmp_path / "run")
    damage(kind, StageFolder(tmp_path / "run", "one").latest())
    found = on_ranks(tmp_path / "logs", 2, cases.resume_refused, small(tmp_path, 1))
    assert all(text is not None for text in found)
    import re

    assert any(re.search(message, text) for text in found), found
    for text in found:
        assert re.search(message, text) or "another rank refused" in text


@pytest.mark.slow
def test_another_model_average_or_precision_is_refused(tmp_path, saved):
    folder, _ = saved[1]
    shutil.copytree(folder / "run", tmp_path / "run")
    run = small(tmp_path, 1)
    wider = replace(run, model=replace(run.model, overrides={**run.model.overrides, "ffn_dim": 96}))
    plain = replace(run, stages=[replace(run.stages[0], ema_decay=None)])
    frozen = replace(run, stages=[replace(run.stages[0], freeze=["image_encoder"])])
    for other, words in (
        (wider, r"fc1.weight' is \[64, 32\] there, \[96, 32\] in this run"),
        (plain, "ema_decay is on in one of run and checkpoint only"),
        (frozen, "is trained in one of run and checkpoint only"),
        (replace(run, precision="bf16"), "trained in fp32, this run in bf16"),
    ):
        (text,) = on_ranks(tmp_path / "logs", 1, cases.resume_refused, other)
        import re

        assert text is not None
        assert re.search(words, text), text


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """Files of this process may grow to a size that the second checkpoint goes beyond."""
    run = small(tmp_path, 0)
    (error,) = on_ranks(tmp_path, 1, cases.save_on_a_full_disk, run)
    assert "could not be written" in error
    assert "step 1 is the last that is whole" in error
    place = StageFolder(tmp_path / "run", "one")
    assert place.latest().name == "step-000001"
    Checkpoint.open(place.latest()).verify()
    assert not list(place.checkpoints.glob("*.tmp"))
    shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    ((results, _),) = on_ranks(tmp_path / "logs", 1, cases.resume_train, run, 1)
    assert results[0].finite


def make_steps(place: StageFolder, scores: dict[int, float | None]) -> None:
    for step, score in scores.items():
        place.at(step).mkdir(parents=True)
        if score is not None:
            (place.at(step) / "evaluation").mkdir()
            content = {"metrics": {"vqa": {"accuracy": score}}}
            (place.at(step) / "evaluation" / "evaluation.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keep", "best", "kept"), [(1, 0, [6]), (2, 0, [5, 6]), (1, 1, [2, 6]), (1, 2, [2, 4, 6])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, kept):
    place = StageFolder(tmp_path, "one")
    make_steps(place, {1: 0.1, 2: 0.9, 3: None, 4: 0.5, 5: 0.2, 6: None})
    (place.checkpoints / "step-000007-abc.tmp").mkdir()
    place.prune(keep, best, "vqa/accuracy")
    assert place.steps() == kept
    place.clear_unfinished()
    assert [entry.name for entry in sorted(place.checkpoints.iterdir())] == [
        f"step-{step:06d}" for step in kept
    ]


@pytest.mark.parametrize("name", ["step-000009", "../../../etc", "", "step-1/../.."])
def test_latest_may_only_name_a_checkpoint_beside_it(tmp_path, name):
    place = StageFolder(tmp_path, "one")
    make_steps(place, {1: None})
    (place.checkpoints / "latest").write_text(name)
    with pytest.raises(ResumeError, match=r"latest.* names"):
        place.latest()
