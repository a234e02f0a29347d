"""The benchmark of the operators: its peers compute the same, its numbers keep their rules."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COLUMNS = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
    "commit,torch,triton,driver,clock_mhz,threads,load_1min"
)
KERNELS = [
    "attention",
    "cross_attention",
    "layer",
    "encoder_layer",
    "layer_norm",
    "gelu_layer_norm",
    "residual_layer_norm",
    "loss",
]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script; it must not get the name of the folder kernels/."""
    module = load_script("kernels", "kernels_benchmark")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other programs, threads wait for one another
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def peers(bench: ModuleType) -> ModuleType:
    return importlib.import_module("peers")


@pytest.fixture(scope="module")
def cases(bench: ModuleType) -> ModuleType:
    return importlib.import_module("kernel_cases")


@pytest.fixture
def green(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_tests", lambda name, device: True)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "kernels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_peer_and_its_gradients_equal_the_reference(
    peers: ModuleType, cases: ModuleType, kernel: str, dtype: torch.dtype
) -> None:
    compared = []
    for peer in peers.PEERS[kernel]:
        if peer.absent(CPU, dtype) is None:
            shape = cases.SHAPES["tiny"][kernel][0]
            case = cases.make_case(kernel, shape, CPU, dtype, training=False)
            peers.check(peer, case)
            compared.append(peer.name)
    assert {"unival", "eager"} <= set(compared)


def test_peers_cover_every_kernel(bench: ModuleType, peers: ModuleType) -> None:
    assert [kernel for kernels in bench.KERNELS.values() for kernel in kernels] == KERNELS
    assert list(peers.PEERS) == KERNELS


def test_the_eager_layer_is_the_models_at_its_size(peers: ModuleType, cases: ModuleType) -> None:
    shape = {**cases.SHAPES["short"]["encoder_layer"][0], "batch": 2}
    case = cases.make_case("encoder_layer", shape, CPU, torch.float32, training=False)
    results = []
    for run in (cases.ours, peers.eager):
        outputs = run(case, case.tensors)
        leaves = list(case.tensors.values())
        results.append([*outputs, *peers.differentiate(outputs, leaves, case.slopes)])
    largest = max(float(x.detach().abs().max()) for x in results[0])
    names = ["total", "normed", *case.tensors]
    for name, one, other in zip(names, *results, strict=True):
        # The gradient of a key projection's bias is zero; what is there is rounding.
        size = largest if name == "self_attn.k_proj.bias" else float(other.detach().abs().max())
        assert float((one - other).detach().abs().max()) <= 1e-5 * size, name


def test_a_case_of_training_drops_and_a_check_does_not(cases: ModuleType) -> None:
    shape = cases.SHAPES["tiny"]["layer"][0]
    rates = [
        cases.make_case("layer", shape, CPU, torch.float32, training).fixed["layer"]
        for training in (True, False)
    ]
    assert [(layer.dropout, layer.drop_path_rate) for layer in rates] == [(0.1, 0.1), (0.0, 0.0)]


@pytest.mark.parametrize("fault", ["value", "gradient", "nan"])
def test_a_peer_that_computes_something_else_is_an_error(
    peers: ModuleType, cases: ModuleType, fault: str
) -> None:
    def wrong(case, t):
        (y,) = peers.eager(case, t)
        if fault == "value":
            return (y * 1.001,)
        if fault == "nan":
            return (y * torch.nan,)
        return (y + 0.01 * (t["weight"] - t["weight"].detach()).sum(),)

    shape = cases.SHAPES["tiny"]["layer_norm"][0]
    case = cases.make_case("layer_norm", shape, CPU, torch.float32)
    where = "in weight" if fault == "gradient" else "in output 0"
    with pytest.raises(peers.WrongPeer, match=f"layer_norm: wrong differs.*{where}"):
        peers.check(peers.Peer("wrong", wrong), case)


def test_a_run_writes_one_schema_plots_and_speedups(
    bench: ModuleType, green: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = bench.main(["--shapes", "tiny", "--repeats", "2", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 0
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    rows = read(tmp_path)
    assert list(dict.fromkeys(row["kernel_name"] for row in rows)) == KERNELS
    for row in rows:
        low, middle, high = (float(row[f"y_value_{part}"]) for part in ("20", "50", "80"))
        memory = row["metric_name"] == "saved_for_backward"
        assert 0 <= low <= middle <= high and (memory or low > 0)
        assert row["metric_unit"] == ("MiB" if memory else "ms")
        extra = json.loads(row["extra_benchmark_config_str"])
        assert extra["dtype"] == "fp32" and extra["repeats"] == 2
        assert row["torch"] == torch.__version__ and int(row["threads"]) > 0
        assert row["driver"] == "none" and len(row["commit"]) >= 40
    for name in KERNELS:
        for provider in ("unival", "eager"):
            found = [
                r for r in rows if (r["kernel_name"], r["kernel_provider"]) == (name, provider)
            ]
            modes = [(row["kernel_operation_mode"], row["metric_name"]) for row in found]
            speeds = [(mode, "speed") for mode in ("forward", "backward", "full")]
            assert modes == [*speeds, ("full", "saved_for_backward")]
    for op in bench.KERNELS:
        assert (tmp_path / f"{op}.png").read_bytes()[:4] == b"\x89PNG"
    assert "over eager" in told and "1.00x" in told
    assert "attention: no flex_attention here: NotImplementedError: " in told
    assert "load_1min" in told


@pytest.mark.parametrize("red", ["tests", "skipped"])
def test_without_green_tests_there_is_no_speedup(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    red: str,
) -> None:
    monkeypatch.setattr(bench, "run_tests", lambda name, device: name == "loss")
    arguments = ["--ops", "layer_norm", "--shapes", "tiny", "--repeats", "2"]
    arguments += ["--out", str(tmp_path), *(["--skip-tests"] if red == "skipped" else [])]
    status = bench.main(arguments)
    told = capsys.readouterr()
    note = "tests failed" if red == "tests" else "tests skipped"
    assert status == (1 if red == "tests" else 0)
    assert "over eager" not in told.out and "1.00x" not in told.out
    rows = read(tmp_path)
    assert rows and all(
        json.loads(row["extra_benchmark_config_str"])["note"].startswith(note) for row in rows
    )
    if red == "tests":
        assert "no speed-up of layer_norm: tests fail" in told.err
    else:
        assert "nothing says the operators are right" in told.out


def test_one_red_operator_does_not_hide_the_others(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "run_tests", lambda name, device: name != "attention")
    arguments = ["--ops", "layer", "layer_norm", "--shapes", "tiny", "--repeats", "2"]
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out.splitlines()
    speedups = {line.split()[0] for line in told if "1.00x" in line}
    assert speedups == {"layer_norm"}
    assert all("tests failed" in line for line in told if line.startswith("encoder_layer  "))


def test_the_gate_runs_pytest_and_names_what_is_red(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Done:
        returncode = 1
        stdout = "F\nFAILED tests/kernels/test_attention.py::test_a - AssertionError\n1 failed"
        stderr = ""

    commands = []
    monkeypatch.setattr(
        bench.subprocess, "run", lambda command, **_: commands.append(command) or Done
    )
    assert bench.gates(["layer", "loss"], CPU) == {"layer": False, "loss": False}
    assert [command[5] for command in commands] == [path for path, _ in bench.TESTS.values()]
    told = capsys.readouterr().out
    assert "$ python -m pytest -q -rfE tests/kernels/test_attention.py -k sdpa" in told
    assert "FAILED tests/kernels/test_attention.py::test_a" in told


def test_a_wide_spread_is_marked_and_its_speedup_in_parentheses(
    bench: ModuleType, cases: ModuleType
) -> None:
    shape = cases.SHAPES["tiny"]["layer_norm"][0]
    case = cases.make_case("layer_norm", shape, CPU, torch.float32)
    for slowest, marked in ((1.1, False), (1.5, True)):
        rows = []
        for peer, times in zip(
            bench.PEERS["layer_norm"], ([1.0, 1.0, 1.0, slowest, slowest], [2.0] * 5), strict=False
        ):
            seconds = dict.fromkeys(bench.MODES, times)
            rows.append(bench.Row("layer_norm", case, peer, seconds, 0, 0.0, 0.0, ""))
        ours = bench.table(rows, {"layer_norm": True}, CPU).splitlines()[1]
        assert ("unreliable: p80/p20 1.50" in ours) == marked
        assert ("(2.00x)" in ours) == marked and "2.00x" in ours


def test_memory_kept_for_backward_is_counted_once_without_inputs(
    bench: ModuleType, cases: ModuleType
) -> None:
    def run(case, t):
        y = t["x"].exp()  # kept, 2 * 5 * 96 floats; the inputs of the products are y and x
        return ((y * y).view(-1) * t["x"].view(-1),)

    case = cases.make_case("layer_norm", cases.SHAPES["tiny"]["layer_norm"][0], CPU, torch.float32)
    peer = bench.Peer("twice", run, without_gradient=("weight", "bias"))
    assert bench.memory(peer, case) == 2 * (2 * 5 * 96) * 4  # exp and the product


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused_by_the_script() -> None:
    # As a script its folder comes first on the path: transformers then finds it as `kernels`.
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", "--device", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--device cuda: torch" in done.stderr and "finds no usable GPU" in done.stderr
    assert done.stdout == ""
