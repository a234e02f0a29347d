"""Files of ceilings, names of GPUs, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from unival.kernels.triton_tools.resources import CHIPS
from unival.planning.calibrate import Calibration, _fit
from unival.planning.ceilings import (
    EFFICIENCY,
    find_ceilings,
    known_ceilings,
    parse_gpus,
    read_ceilings,
)
from unival.planning.counts import KINDS

GOOD = {
    "names": ["Mine"],
    "source": "a test",
    "memory_gb": 16,
    "tflops": {"fp32": 10, "bf16": 100},
    "bandwidth_gbs": 500,
    "launch_us": 5,
}


def write(folder: Path, **changed: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | changed))
    return path


def test_the_shipped_gpus_agree_with_the_table_of_the_kernels() -> None:
    for chip in CHIPS.values():
        found = find_ceilings(chip.name)
        assert found.peak["bf16"] == chip.tensor_flops
        assert found.peak["fp32"] == chip.float32_flops
        assert found.bandwidth == chip.bandwidth


def test_every_name_is_of_one_device_and_every_kind_of_work_has_an_efficiency() -> None:
    found = known_ceilings()
    assert len(found) >= 8
    for device in found:
        assert set(device.efficiency) == set(KINDS)
        for name in device.names:
            assert find_ceilings(name) == device
    assert set(EFFICIENCY) == set(KINDS)


@pytest.mark.parametrize("name", ["a6000", "RTX A6000", "rtx-a6000", "A100-80gb", "a100 80"])
def test_case_spaces_and_hyphens_do_not_matter(name: str) -> None:
    assert find_ceilings(name).memory == (48e9 if "6000" in name else 80e9)


def test_an_unknown_gpu_lists_the_known_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'V100'.*A100-80.*H200.*--ceilings FILE"):
        find_ceilings("V100")


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    share = {"peak": [0.2, 0.4, 0.5], "bandwidth": [0.3, 0.6, 0.7], "launches": 4}
    first = read_ceilings(write(tmp_path, efficiency={"conv": share}, link_gbs=20))
    assert first.efficiency["conv"].peak == (0.2, 0.4, 0.5)
    assert first.efficiency["matmul"] == EFFICIENCY["matmul"]
    assert (first.memory, first.bandwidth, first.link) == (16e9, 500e9, 20e9)
    first.save(tmp_path / "again.yaml")
    assert read_ceilings(tmp_path / "again.yaml") == first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bandwith_gbs": 3}, "bandwith_gbs.*did you mean 'bandwidth_gbs'"),
        ({"bandwidth_gbs": 0}, "bandwidth_gbs is 0; wanted a number above 0"),
        ({"bandwidth_gbs": float("nan")}, "bandwidth_gbs is nan"),
        ({"memory_gb": "80"}, "memory_gb is '80'"),
        ({"memory_gb": True}, "memory_gb is True"),
        ({"launch_us": -1}, "launch_us is -1; wanted a number of at least 0"),
        ({"tflops": {"fp8": 1}}, "tflops.*fp32, bf16, fp16"),
        ({"tflops": {"fp32": float("inf")}}, "tflops.fp32 is inf"),
        ({"names": []}, "names is"),
        ({"names": [4090]}, "names is"),
        ({"overlapped": 1}, "overlapped is 1"),
        ({"efficiency": {"magic": {}}}, "efficiency: wanted kinds"),
        ({"efficiency": {"conv": [0.1, 0.2, 0.3]}}, "efficiency.conv: wanted peak"),
        ({"efficiency": {"conv": {"peak": [0.5, 0.4, 0.6]}}}, "do not fall"),
        ({"efficiency": {"conv": {"peak": [0, 0.4, 0.6]}}}, "efficiency.conv.peak is 0"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_key(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    path = write(tmp_path, **changed)
    with pytest.raises(ValueError, match=said) as raised:
        read_ceilings(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "!!python/object/apply:os.getcwd []", "\xff"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read_ceilings(path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_ceilings(tmp_path / "none.yaml")


def test_numbers_and_names_of_gpus() -> None:
    assert parse_gpus("4xA6000") == (4, "A6000")
    assert parse_gpus(" 16 x H100 ") == (16, "H100")
    assert parse_gpus("RTX 4090") == (1, "RTX 4090")
    assert parse_gpus("2x4090") == (2, "4090")


@pytest.mark.parametrize(
    "text", ["", "4", "0xA100", "-1xA100", "4x", "9999999xA100", "4xA\n100/.."]
)
def test_what_is_no_number_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 4xA6000"):
        parse_gpus(text)


def test_the_fit_finds_what_rows_were_made_of() -> None:
    # seconds = 2e-9 per operation + 3e-10 per byte + 1e-5 per call.
    made = [(1e6, 1e5, 1.0), (1e8, 1e6, 2.0), (1e5, 1e7, 1.0), (1e3, 1e3, 9.0)]
    rows = [(f, b, c, 2e-9 * f + 3e-10 * b + 1e-5 * c) for f, b, c in made]
    assert _fit(rows, (1, 1, 1)) == pytest.approx((2e-9, 3e-10, 1e-5), rel=1e-6)
    # A cost that would be below 0 is left out.
    rows = [(f, b, c, 2e-9 * f - 1e-13 * b) for f, b, c in made[:2]]
    assert _fit(rows, (1, 1, 0)) == pytest.approx((2e-9, 0.0, 0.0), rel=1e-2)


def test_a_round_of_calibration_gives_ceilings_of_this_processor(tmp_path: Path) -> None:
    calibration = Calibration()
    with pytest.raises(ValueError, match="no round"):
        calibration.ceilings()
    calibration.round()
    first = dict(calibration.best)
    calibration._run(0, calibration.workloads[0])
    # The fastest try of every workload counts; more rounds cannot make one slower.
    assert calibration.best.keys() == first.keys()
    assert all(calibration.best[key][3] <= row[3] for key, row in first.items())
    found = calibration.ceilings()
    assert found.measured and not found.overlapped
    assert 1e9 < found.peak["fp32"] < 1e13
    assert found.allocation > 1e8 and 1e9 < found.bandwidth < 1e12
    kinds = {kind for _, _, kind in calibration.best}
    assert kinds == set(KINDS) - {"statistics"}  # sums, on a CPU
    # 2 x rows x inputs x outputs of the first map, forward.
    row = first[0, "forward", "matmul"]
    assert row[0] == 2 * 12 * 768 * 768
    found.save(tmp_path / "cpu.yaml")
    assert read_ceilings(tmp_path / "cpu.yaml").efficiency.keys() == found.efficiency.keys()
