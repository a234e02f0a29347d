"""Run configs: dataclasses filled from YAML and `key=value` overrides, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used: says where it came from, which key, and what would be right."""


def load_config(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Fill `schema` from a YAML file and overrides such as `stages.0.steps=3`.

    `base: other.yaml` in a file inherits from another one, relative to it: mappings are merged,
    lists replaced. An override replaces the whole value of its key; its value is read as YAML.

    Raises:
        ConfigError: missing file, YAML syntax, loop of bases, unknown key (names the nearest),
            wrong type, missing value.
    """
    layers = _read(Path(path), [])
    for origin, content in layers:
        _check(schema, content, str(origin), "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *(content for _, content in layers))
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(merged))
        for override in overrides:
            _override(schema, plain, override)
        filled = OmegaConf.merge(OmegaConf.structured(schema), plain)
        return typing.cast(T, OmegaConf.to_object(filled))
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "")
        if isinstance(error, MissingMandatoryValue):
            raise ConfigError(f"{path}: {key!r} is required and not given") from error
        raise ConfigError(f"{path}: {key!r}: {_first_line(error)}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _read(path: Path, children: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The contents of a file and its bases, the furthest base first."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " -> ".join(map(str, [*children, path]))
        raise ConfigError(f"{path}: its `base` entries form a loop: {chain}")
    if not path.is_file():
        asked = f" (`base` of {children[-1]})" if children else ""
        raise ConfigError(f"{path}: no such config file{asked}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{path}{where}: not valid YAML: {problem}") from error
    except OSError as error:  # a lone number, or a file that cannot be read
        raise ConfigError(f"{path}: cannot be read as a config: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    content = typing.cast(dict[str, Any], OmegaConf.to_container(loaded))
    base = content.pop("base", None)
    if base is None:
        return [(path, content)]
    return [*_read(path.parent / str(base), [*children, path]), (path, content)]


def _override(schema: type, config: dict[str, Any], override: str) -> None:
    """Set the value of one `key=value` in a config of plain dicts and lists."""
    origin = f"override {override!r}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{origin}: write key=value")
    try:
        given = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: its value is not valid YAML") from error
    value = typing.cast(dict[str, Any], OmegaConf.to_container(given))["value"]

    annotation: Any = schema
    node: Any = config
    names = key.split(".")
    for depth, name in enumerate(names):
        annotation = _child(annotation, name, origin, names[:depth])
        slot: Any = name
        if isinstance(node, list):
            slot = _index(name, len(node), origin, ".".join(names[:depth]))
        if depth == len(names) - 1:
            _check(annotation, value, origin, key)
            node[slot] = value
            return
        below = node[slot] if isinstance(node, list) else node.get(slot)
        if not isinstance(below, dict | list):  # null, or a required value that no file gives
            below = [] if typing.get_origin(_inner(annotation)) is list else {}
            node[slot] = below
        node = below


def _index(name: str, length: int, origin: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= length:
        known = f"0 to {length - 1}" if length else "none, it is empty"
        raise ConfigError(f"{origin}: {key!r} has no element {name!r}; known elements: {known}")
    return int(name)


def _inner(annotation: Any) -> Any:
    """The type behind Optional."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        given = [a for a in typing.get_args(annotation) if a is not type(None)]
        return given[0] if len(given) == 1 else annotation
    return annotation


def _child(annotation: Any, name: str, origin: str, parents: Sequence[str]) -> Any:
    """The type of what lies under a key; refuses a key that the schema does not have."""
    annotation = _inner(annotation)
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        if name in hints:
            return hints[name]
        key = ".".join([*parents, name])
        nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*parents, *nearest])!r}?" if nearest else ""
        raise ConfigError(f"{origin}: unknown key {key!r}{hint}")
    if typing.get_origin(annotation) in (list, dict):
        return typing.get_args(annotation)[-1]
    if annotation is Any:
        return Any
    raise ConfigError(f"{origin}: {'.'.join(parents)!r} has no keys below it")


def _check(annotation: Any, value: Any, origin: str, key: str) -> None:
    """Refuse unknown keys and wrong types at any depth, naming the key and where it was given."""
    inner = _inner(annotation)
    container = typing.get_origin(inner)
    nested: Sequence[tuple[Any, Any]] = ()
    if dataclasses.is_dataclass(inner) or container is dict:
        fits = isinstance(value, dict)
        nested = list(value.items()) if fits else ()
    elif container is list:
        fits = isinstance(value, list)
        nested = list(enumerate(value)) if fits else ()
    else:
        fits = _converts(annotation, value)
    optional = inner is not annotation
    if not fits and not (value is None and optional) and value != "???":
        wanted = _describe(annotation)
        raise ConfigError(f"{origin}: {key!r} is {value!r}; wanted {wanted}")
    parents = key.split(".") if key else []
    for name, below in nested:
        annotation_below = _child(inner, str(name), origin, parents)
        _check(annotation_below, below, origin, ".".join([*parents, str(name)]))


def _converts(annotation: Any, value: Any) -> bool:
    """Whether OmegaConf takes a value for a field; `${other.key}` is resolved after merging."""
    if isinstance(value, str) and "${" in value:
        return True
    holder = dataclasses.make_dataclass("Holder", [("value", annotation)])
    try:
        OmegaConf.merge(OmegaConf.structured(holder), {"value": value})
    except OmegaConfBaseException:
        return False
    return True


def _describe(annotation: Any) -> str:
    inner = _inner(annotation)
    container = typing.get_origin(inner)
    if container is list:
        wanted = f"a list of {_describe(typing.get_args(inner)[0])}"
    elif container is dict:
        wanted = f"a mapping to {_describe(typing.get_args(inner)[1])}"
    elif dataclasses.is_dataclass(inner):
        names = ", ".join(field.name for field in dataclasses.fields(inner))
        wanted = f"{typing.cast(type, inner).__name__} ({names})"
    else:
        wanted = inner.__name__ if isinstance(inner, type) else str(inner).removeprefix("typing.")
    return wanted if inner is annotation else f"{wanted} or null"
