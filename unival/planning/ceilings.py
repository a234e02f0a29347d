"""What a machine can do at most, and how near to it each kind of work comes.

A file of configs/ceilings is a datasheet, or what `measure_ceilings` found on a machine.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ceilings"
KEYS = (
    "names",
    "source",
    "measured",
    "memory_gb",
    "tflops",
    "bandwidth_gbs",
    "link_gbs",
    "allocation_gbs",
    "launch_us",
    "overlapped",
    "efficiency",
)
FLAGS = {"measured": False, "overlapped": True}
PRECISIONS = ("fp32", "bf16", "fp16")


class Share(NamedTuple):
    """A share of a ceiling that is reached: at worst, most likely and at best."""

    low: float
    likely: float
    high: float


class Reach(NamedTuple):
    """What a kind of work reaches of the peak and of the bandwidth, and the launches of a call."""

    peak: Share
    bandwidth: Share
    launches: float = 1.0


_STREAM = Share(0.50, 0.70, 0.85)
# Of a datasheet's peak and bandwidth: what cuDNN, cuBLAS and kernels like ours reach on such GPUs
# by experience; nothing here was measured on one by this project.
EFFICIENCY = {
    "conv": Reach(Share(0.25, 0.45, 0.65), _STREAM, 2.0),
    "pointwise_conv": Reach(Share(0.25, 0.45, 0.65), _STREAM, 2.0),
    "grouped_conv": Reach(Share(0.01, 0.04, 0.10), _STREAM, 2.0),
    "matmul": Reach(Share(0.35, 0.55, 0.75), _STREAM),
    "attention": Reach(Share(0.10, 0.25, 0.45), _STREAM, 3.0),
    "loss": Reach(Share(0.30, 0.50, 0.70), _STREAM, 8.0),
    "memory": Reach(Share(1.0, 1.0, 1.0), _STREAM),
    "statistics": Reach(Share(1.0, 1.0, 1.0), Share(0.30, 0.45, 0.65)),
}


@dataclass(frozen=True)
class Ceilings:
    """A device.

    names       what it is called; the first is its own
    source      where the numbers are from
    measured    on this device, not from a datasheet
    memory      bytes
    peak        dense operations per second by precision
    bandwidth   of its memory, bytes per second
    link        bytes per second that a device sends to the others; 0: there is no link
    allocation  bytes per second at which the system hands out new memory; 0: it costs nothing
    launch      seconds that an operator takes at least
    overlapped  launches go ahead of the device's work, so that only the longer of both counts
    efficiency  by kind of work
    """

    names: tuple[str, ...]
    source: str
    measured: bool
    memory: int
    peak: dict[str, float]
    bandwidth: float
    link: float
    allocation: float
    launch: float
    overlapped: bool
    efficiency: dict[str, Reach] = field(default_factory=lambda: dict(EFFICIENCY))

    @property
    def name(self) -> str:
        return self.names[0]

    def save(self, path: Path) -> None:
        """Write a file that `read_ceilings` reads."""
        told = {
            "names": list(self.names),
            "source": self.source,
            "measured": self.measured,
            "memory_gb": round(self.memory / 1e9, 2),
            "tflops": {name: round(value / 1e12, 5) for name, value in self.peak.items()},
            "bandwidth_gbs": round(self.bandwidth / 1e9, 3),
            "link_gbs": round(self.link / 1e9, 3),
            "allocation_gbs": round(self.allocation / 1e9, 3),
            "launch_us": round(self.launch * 1e6, 3),
            "overlapped": self.overlapped,
            "efficiency": {
                kind: {
                    "peak": [round(value, 4) for value in reach.peak],
                    "bandwidth": [round(value, 4) for value in reach.bandwidth],
                    "launches": round(reach.launches, 2),
                }
                for kind, reach in self.efficiency.items()
            },
        }
        text = yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=100)
        path.write_text(text, encoding="utf-8")


def read_ceilings(path: str | Path) -> Ceilings:
    """Read a file of ceilings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: names the file, the key, and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of ceilings")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: ceilings are a mapping of keys to values")
    return _parse(path, content)


def _parse(path: Path, content: dict[Any, Any]) -> Ceilings:
    for key in content:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{path}: unknown key {key!r}; did you mean {near!r}?")
    names = content.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{path}: names is {names!r}; wanted a list of at least one name")
    flags = {key: content.get(key, default) for key, default in FLAGS.items()}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r}; wanted true or false")
    peak = content.get("tflops")
    if not isinstance(peak, dict) or not peak or not set(peak) <= set(PRECISIONS):
        raise ValueError(
            f"{path}: tflops is {peak!r}; wanted numbers by precision ({', '.join(PRECISIONS)})"
        )
    given = content.get("efficiency", {})
    if not isinstance(given, dict) or not set(given) <= set(EFFICIENCY):
        raise ValueError(f"{path}: efficiency: wanted kinds of work ({', '.join(EFFICIENCY)})")
    reached = {kind: _reach(path, kind, value) for kind, value in given.items()}
    return Ceilings(
        names=tuple(names),
        source=str(content.get("source", "not told")),
        measured=flags["measured"],
        memory=int(_number(path, "memory_gb", content.get("memory_gb")) * 1e9),
        peak={p: 1e12 * _number(path, f"tflops.{p}", value) for p, value in peak.items()},
        bandwidth=1e9 * _number(path, "bandwidth_gbs", content.get("bandwidth_gbs")),
        link=1e9 * _number(path, "link_gbs", content.get("link_gbs", 0), least=0.0),
        allocation=1e9
        * _number(path, "allocation_gbs", content.get("allocation_gbs", 0), least=0.0),
        launch=1e-6 * _number(path, "launch_us", content.get("launch_us"), least=0.0),
        overlapped=flags["overlapped"],
        efficiency=EFFICIENCY | reached,
    )


def _number(path: Path, key: str, value: Any, least: float | None = None) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not fits or not (value > 0 if least is None else value >= least):
        wanted = "above 0" if least is None else f"of at least {least:g}"
        raise ValueError(f"{path}: {key} is {value!r}; wanted a number {wanted}")
    return float(value)


def _reach(path: Path, kind: str, value: Any) -> Reach:
    key, usual = f"efficiency.{kind}", EFFICIENCY[kind]
    if not isinstance(value, dict) or not set(value) <= set(Reach._fields):
        raise ValueError(f"{path}: {key}: wanted {', '.join(Reach._fields)}")
    return Reach(
        _share(path, f"{key}.peak", value.get("peak", list(usual.peak))),
        _share(path, f"{key}.bandwidth", value.get("bandwidth", list(usual.bandwidth))),
        _number(path, f"{key}.launches", value.get("launches", usual.launches), least=0.0),
    )


def _share(path: Path, key: str, value: Any) -> Share:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{path}: {key} is {value!r}; wanted [at worst, likely, at best]")
    share = Share(*(_number(path, key, one) for one in value))
    if not share.low <= share.likely <= share.high:
        raise ValueError(f"{path}: {key} is {value!r}; wanted numbers that do not fall")
    return share


def known_ceilings(folder: Path = FOLDER) -> list[Ceilings]:
    """All files of a folder."""
    return [read_ceilings(path) for path in sorted(folder.glob("*.yaml"))]


def find_ceilings(name: str, folder: Path = FOLDER) -> Ceilings:
    """The device of a name, whatever its case, spaces and hyphens.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    found = known_ceilings(folder)
    for ceilings in found:
        if _plain(name) in map(_plain, ceilings.names):
            return ceilings
    known = ", ".join(ceilings.name for ceilings in found) or "none"
    raise ValueError(
        f"unknown GPU {name!r}; known: {known}. For another one write a file like those of "
        "configs/ceilings from its datasheet and give it with --ceilings FILE"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def parse_gpus(text: str) -> tuple[int, str]:
    """Number and name of `4xA6000` or `A6000`.

    Raises:
        ValueError: not of that form, or a number that no cluster has.
    """
    name = r"[\w -]{0,40}"
    found = re.fullmatch(rf"(?:(\d{{1,6}})\s*[x*]\s*(\w{name})|([A-Za-z]{name}))", text.strip())
    number = int(found[1] or 1) if found else 0
    if found is None or number < 1:
        raise ValueError(f"gpus {text!r}; wanted a number and a name, such as 4xA6000")
    return number, (found[2] or found[3]).strip()
