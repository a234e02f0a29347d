"""Who may import whom, and what no file may do, read from the sources without importing them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("unival", "kernels", "data_gpu", "benchmarks", "tests")
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FROM_TRAINING = (
    "unival/training/",
    "unival/cli.py",
    "unival/train.py",
    "unival/launch.py",
    "unival/demo.py",
    "unival/evaluate.py",
    "unival/finetune.py",
    "unival/recipes.py",
    "unival/zero_shot.py",
    "unival/planning/",
)


def module_name(path: str) -> str:
    """The name a file is imported under: kernels/ and data_gpu/ are unival.kernels and so on."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] in ("kernels", "data_gpu"):
        parts.insert(0, "unival")
    return ".".join(parts)


def imports(path: str) -> Iterator[str]:
    """Modules that a file imports, inside functions too; `from a import b` counts as a.b.

    Relative imports are made absolute.
    """
    package = module_name(path).split(".")
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def files(*starts: str) -> list[str]:
    found = [path for path in SOURCES if path.startswith(starts)]
    assert found, f"no sources under {starts}"
    return found


def violations(paths: list[str], forbidden: tuple[str, ...], except_for: tuple[str, ...] = ()):
    return [
        f"{path} imports {name}"
        for path in paths
        for name in imports(path)
        if inside(name, forbidden) and not inside(name, except_for)
    ]


def test_kernels_know_torch_and_triton_only():
    allowed = (*sys.stdlib_module_names, "torch", "triton", "unival.kernels")
    wrong = [
        f"{path} imports {name}"
        for path in files("kernels/")
        for name in imports(path)
        if not inside(name, allowed)
        # An optional package, imported only where a user asks for it by name.
        and not (path == "kernels/attention/flash.py" and inside(name, ("flash_attn",)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "forbidden", "except_for"),
    [
        ("data_gpu/", ("unival",), ("unival.data_gpu",)),
        (
            "unival/model/",
            (
                "unival.data",
                "unival.tasks",
                "unival.training",
                "unival.evaluation",
                "unival.data_gpu",
                "unival.convert",
            ),
            (),
        ),
        ("unival/tasks/", ("unival.model", "unival.training", "unival.evaluation"), ()),
    ],
)
def test_packages_do_not_know_those_above_them(folder, forbidden, except_for):
    # The contract between data, tasks and model is in unival.data.records: plain dataclasses.
    wrong = violations(files(folder), forbidden, except_for)
    assert not wrong, "\n".join(wrong)


def test_only_entry_points_import_training():
    others = [path for path in files("unival/") if not path.startswith(FROM_TRAINING)]
    wrong = violations([*others, *files("kernels/", "data_gpu/")], ("unival.training",))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", ["kernels/__init__.py", "data_gpu/__init__.py"])
def test_mapped_packages_are_light_to_import(path):
    # Other libraries may import a folder of this name from the working directory to look at it.
    assert not violations([path], ("torch", "triton"))


def test_mapped_packages_are_never_imported_by_their_bare_names():
    wrong = violations(list(SOURCES), ("kernels", "data_gpu"))
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles():
    packages = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    # Tests may write pickles, to see them refused, and copy objects in memory as workers do.
    # One file reads pickles of plain data; tests/data/test_pickles.py sees others refused there.
    own = [p for p in SOURCES if not p.startswith("tests/") and p != "unival/data/pickles.py"]
    wrong = violations(own, packages)
    reading = ("pickle.load", "pickle.Unpickler")
    for path in files("tests/"):
        wrong += violations([path], reading)
        wrong += [f"{path}:{call.lineno}: {name}" for name, call in calls(path) if name in reading]
    assert not wrong, "\n".join(wrong)


def calls(path: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls in a file with the called name as written: `torch.load`, `eval`."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES)
def test_no_code_from_text_and_no_unsafe_load(path):
    for name, call in calls(path):
        where = f"{path}:{call.lineno}"
        assert name not in ("eval", "exec", "builtins.eval", "builtins.exec"), f"{where}: {name}()"
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{where}: torch.load of code"
        elif name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle", "False") == "False", f"{where}: np.load of code"
    for name in imports(path):
        assert name != "torch.load", f"{path}: call it as torch.load, so that this test sees it"


def test_the_checks_find_what_they_look_for(monkeypatch):
    source = "from ..training import losses\nimport pickle as p\nfrom torch import load\n"
    monkeypatch.setitem(SOURCES, "unival/model/sample.py", ast.parse(source))
    assert violations(["unival/model/sample.py"], ("unival.training", "pickle")) == [
        "unival/model/sample.py imports unival.training.losses",
        "unival/model/sample.py imports pickle",
    ]
    monkeypatch.setitem(SOURCES, "kernels/a/__init__.py", ast.parse("from ..b import c"))
    assert list(imports("kernels/a/__init__.py")) == ["unival.kernels.b.c"]
