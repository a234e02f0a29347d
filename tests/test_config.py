"""Run configs: inheritance, overrides, and errors that say what to write instead."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from unival.config import ConfigError, load_config, save_config
from unival.training.options import Run

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Batch:
    medium: str
    rows: int = 4


@dataclass
class Part:
    name: str
    steps: int
    batches: list[Batch] = field(default_factory=list)
    clip: float | None = None


@dataclass
class Net:
    width: int = 8
    start: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Whole:
    output: str
    parts: list[Part]
    net: Net = field(default_factory=Net)
    second: Net | None = None
    sources: dict[str, Batch] = field(default_factory=dict)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    precise: bool = True


TEXT = """\
output: runs/x
parts:
  - {name: a, steps: 10, batches: [{medium: image}, {medium: video, rows: 2}]}
  - {name: b, steps: 20}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, path, overrides)
    return str(caught.value)


def test_nested_lists_become_dataclasses_with_defaults_filled_in(write):
    config = load_config(Whole, write(TEXT), [])
    batches = [Batch("image", 4), Batch("video", 2)]
    assert config == Whole("runs/x", [Part("a", 10, batches), Part("b", 20)])


def test_overrides_reach_into_lists_and_leave_the_neighbours_alone(write):
    config = load_config(Whole, write(TEXT), ["parts.0.steps=3", "parts.0.batches.1.rows=9"])
    assert config.parts == [Part("a", 3, [Batch("image"), Batch("video", 9)]), Part("b", 20)]


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("net.width=9", lambda c: c.net.width, 9),
        ("betas.0=0.5", lambda c: c.betas, [0.5, 0.999]),  # an element of a default
        ("betas=[0.1, 1e-3]", lambda c: c.betas, [0.1, 0.001]),
        ("parts.1.clip=2", lambda c: c.parts[1].clip, 2.0),
        ("parts.1.clip=null", lambda c: c.parts[1].clip, None),
        ("second.width=3", lambda c: c.second, Net(3)),  # null until now
        ("sources.web.medium=text", lambda c: c.sources, {"web": Batch("text")}),
        ("net.extra.rate=1e-3", lambda c: c.net.extra, {"rate": 0.001}),  # a number, not a text
        ("precise=off", lambda c: c.precise, False),
        ("output=a=b", lambda c: c.output, "a=b"),
        ("output=${parts.0.name}", lambda c: c.output, "a"),
    ],
)
def test_override_sets(write, override, read, expected):
    assert read(load_config(Whole, write(TEXT), [override])) == expected


def test_an_override_replaces_a_mapping_and_later_ones_win(write):
    path = write(TEXT + "net: {width: 5, start: w, extra: {a: 1}}\n")
    config = load_config(Whole, path, ["net.extra={b: 2}", "net.width=6", "net.width=7"])
    assert config.net == Net(7, "w", {"b": 2})


def test_a_base_is_merged_deeply_and_its_lists_are_replaced(write):
    write(TEXT + "net: {width: 5, start: w}\n", "base.yaml")
    path = write(
        "base: ../base.yaml\nnet: {width: 6}\nparts: [{name: c, steps: 1}]\n", "sub/c.yaml"
    )
    config = load_config(Whole, path, ["parts.0.steps=2"])
    assert config == Whole("runs/x", [Part("c", 2)], Net(6, "w"))


def test_null_in_a_child_clears_what_the_base_gives(write):
    write(TEXT + "net: {start: w}\n", "base.yaml")
    assert load_config(Whole, write("base: base.yaml\nnet: {start: null}\n"), []).net.start is None


def test_a_loop_of_bases_is_refused_with_its_chain(write):
    first = write("base: two.yaml\n", "one.yaml")
    write("base: one.yaml\n", "two.yaml")
    message = refused(first)
    assert "loop" in message
    assert message.count("one.yaml") == 3 and "two.yaml" in message


def test_a_missing_base_is_named_with_the_file_that_asked(write):
    message = refused(write("base: nowhere.yaml\n"))
    assert "nowhere.yaml: no such config file" in message and "run.yaml" in message


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        (TEXT + "ouput: y\n", "ouput", "output"),
        (TEXT.replace("steps: 10", "step: 10"), "parts.0.step", "parts.0.steps"),
        (TEXT.replace("rows: 2", "row: 2"), "parts.0.batches.1.row", "parts.0.batches.1.rows"),
        (TEXT + "sources: {web: {medum: a}}\n", "sources.web.medum", "sources.web.medium"),
    ],
)
def test_an_unknown_key_of_a_file_names_the_file_and_the_nearest(write, text, key, nearest):
    message = refused(write(text))
    assert message.endswith(f"run.yaml: unknown key {key!r}; did you mean {nearest!r}?")


def test_an_unknown_key_of_a_base_names_the_base(write):
    write("net: {widht: 3}\n", "base.yaml")
    message = refused(write("base: base.yaml\n" + TEXT))
    assert message.endswith("base.yaml: unknown key 'net.widht'; did you mean 'net.width'?")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("nett.width=3", "unknown key 'nett'; did you mean 'net'?"),
        ("parts.0.batches.0.rowz=3", "did you mean 'parts.0.batches.0.rows'?"),
        ("net={widht: 3}", "unknown key 'net.widht'; did you mean 'net.width'?"),
        ("parts.0.steps=many", "'parts.0.steps' is 'many'; wanted int"),
        ("parts.0.steps=1.5", "'parts.0.steps' is 1.5; wanted int"),
        ("parts.0.steps=true", "'parts.0.steps' is True; wanted int"),
        ("parts.0.steps=", "'parts.0.steps' is None; wanted int"),
        ("parts.0.clip=high", "'parts.0.clip' is 'high'; wanted float or null"),
        ("parts=3", "'parts' is 3; wanted a list of Part (name, steps, batches, clip)"),
        ("net=[1]", "'net' is [1]; wanted Net (width, start, extra)"),
        ("sources.web=x", "'sources.web' is 'x'; wanted Batch (medium, rows)"),
        ("parts.2.steps=3", "'parts' has no element '2'; known elements: 0 to 1"),
        ("parts.-1.steps=3", "'parts' has no element '-1'"),
        ("parts.a.steps=3", "'parts' has no element 'a'"),
        ("output.x=3", "'output' has no keys below it"),
        ("betas=[1", "not valid YAML"),
        ("precise", "write key=value"),
        ("=3", "write key=value"),
    ],
)
def test_a_wrong_override_is_quoted_with_what_would_be_right(write, override, problem):
    message = refused(write(TEXT), override)
    assert message.startswith(f"override {override!r}: ")
    assert problem in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXT.replace("10", "ten"), "run.yaml: 'parts.0.steps' is 'ten'; wanted int"),
        (TEXT + "betas: [0.9, x]\n", "run.yaml: 'betas.1' is 'x'; wanted float"),
        (TEXT + "net: small\n", "run.yaml: 'net' is 'small'; wanted Net (width, start, extra)"),
        (TEXT + "net: null\n", "run.yaml: 'net' is None; wanted Net"),
        ("output: x\n", "run.yaml: 'parts' is required and not given"),
        (TEXT.replace("name: b, ", ""), "run.yaml: 'parts.1.name' is required and not given"),
        (TEXT.replace("runs/x", "${nope}"), "run.yaml: 'output': Interpolation key 'nope'"),
        (TEXT + "net: {width: ]\n", "run.yaml, line 5: not valid YAML"),
        (TEXT + "output: again\n", "run.yaml, line 5: not valid YAML: found duplicate key output"),
        (TEXT + "net: !!python/name:os.system\n", "run.yaml, line 5: not valid YAML"),
        ("- a\n", "run.yaml: a config is a mapping"),
        ("3\n", "run.yaml: cannot be read as a config"),
    ],
)
def test_a_wrong_file_is_refused_with_what_would_be_right(write, text, problem):
    assert problem in refused(write(text))


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"


def test_a_saved_config_reads_back_equal(write, tmp_path):
    config = load_config(Whole, write(TEXT), ["second.start=w", "sources.web={medium: text}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Whole, tmp_path / "saved.yaml", []) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=str)
def test_the_runs_of_this_repository_fit_their_schema(path):
    assert load_config(Run, path, ["stages.0.steps=3"]).stages[0].steps == 3
