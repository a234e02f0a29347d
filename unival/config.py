"""Run configs: dataclasses filled from YAML and `key=value` overrides, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used; the message names where it came from, the key and what is right."""


def load_config(schema: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> T:
    """Fill `schema` from a YAML file and overrides such as `stages.0.steps=3`.

    `base: other.yaml` in a file inherits from another one, relative to it.

    Raises:
        ConfigError: missing file, YAML syntax, unknown key (names the nearest), wrong type.
    """
    content = _read(Path(path), [])
    _check_keys(schema, content, str(path), "")
    merged = OmegaConf.create(content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: write key=value")
        _check_path(schema, key.split("."), override)
        try:
            OmegaConf.update(merged, key, yaml.safe_load(value))
        except (OmegaConfBaseException, yaml.YAMLError, IndexError, TypeError) as error:
            raise ConfigError(f"override {override!r}: {_first_line(error)}") from error
    try:
        filled = OmegaConf.merge(OmegaConf.structured(schema), merged)
        return typing.cast(T, OmegaConf.to_object(filled))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}{_key_of(error)}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _key_of(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key!r})" if key else ""


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: its `base` entries form a loop")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    base = content.pop("base", None)
    if base is None:
        return content
    inherited = OmegaConf.create(_read(path.parent / str(base), [*seen, path]))
    return typing.cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.merge(inherited, OmegaConf.create(content)))
    )


def _inner(annotation: Any) -> Any:
    """The type behind Optional."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _unknown(name: str, schema: type, origin: str, prefix: str) -> ConfigError:
    known = [field.name for field in dataclasses.fields(schema)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ConfigError(f"{origin}: unknown key {prefix + name!r}; did you mean {prefix + nearest!r}?")


def _check_keys(annotation: Any, value: Any, origin: str, prefix: str) -> None:
    """Refuse unknown keys at any depth before OmegaConf does, to name the nearest one."""
    annotation = _inner(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        hints = typing.get_type_hints(annotation)
        for key, inner in value.items():
            if key not in hints:
                raise _unknown(str(key), typing.cast(type, annotation), origin, prefix)
            _check_keys(hints[key], inner, origin, f"{prefix}{key}.")
    elif typing.get_origin(annotation) is list and isinstance(value, list):
        for index, inner in enumerate(value):
            _check_keys(typing.get_args(annotation)[0], inner, origin, f"{prefix}{index}.")
    elif typing.get_origin(annotation) is dict and isinstance(value, dict):
        for key, inner in value.items():
            _check_keys(typing.get_args(annotation)[1], inner, origin, f"{prefix}{key}.")


def _check_path(annotation: Any, keys: list[str], override: str) -> None:
    """The same for the dotted key of an override."""
    prefix = ""
    for key in keys:
        annotation = _inner(annotation)
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            if key not in hints:
                raise _unknown(key, typing.cast(type, annotation), f"override {override!r}", prefix)
            annotation = hints[key]
        elif typing.get_origin(annotation) is list:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            raise ConfigError(f"override {override!r}: {prefix.rstrip('.')!r} has no keys below it")
        prefix += f"{key}."
