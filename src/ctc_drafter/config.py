"""Recipes: YAML files read into dataclasses, with every unknown or ill-typed key named before any work starts."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError

T = TypeVar("T")
MAX_DEPTH, MAX_VALUES = 32, 100_000
"""Of a recipe."""
SHOWN = 80
"""Characters of a wrong value that an error repeats."""


def load_recipe(
    cls: type[T],
    path: str | Path | None,
    overrides: dict[str, Any] | None = None,
    settings: Sequence[str] | None = None,
) -> T:
    """Read the YAML file `path` into dataclass `cls`; entries of `overrides` that are not None win over it.

    `settings`, such as `drafter.layers=2`, win over both. Raises UserError for a missing file, broken YAML, an unknown
    key, a missing key or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = _load_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"Recipe '{path}' does not exist; recipes/ holds examples.") from None
        except (ValueError, OSError) as error:
            raise UserError(f"Recipe '{path}' cannot be read as YAML: {_said(error)}.") from None
        if not isinstance(values, dict):
            raise UserError(f"Recipe '{path}' must be a mapping of keys to values.")
    values.update({k: v for k, v in (overrides or {}).items() if v is not None})
    for setting in settings or ():
        _set(cls, values, setting)
    return from_mapping(cls, values, str(path or "command line"))


def _load_yaml(text: str) -> Any:
    """What the text says; raises ValueError if that is not YAML, or larger than any recipe."""
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # beside its own errors yaml raises whatever its constructors stumble over
        raise ValueError(str(error) or type(error).__name__) from None
    _measure(value, MAX_DEPTH, [MAX_VALUES])
    return value


def _measure(value: Any, depth: int, left: list[int]) -> None:
    """Raise ValueError if there are too many values; an alias counts as often as it is met, also inside itself."""
    left[0] -= 1
    if depth == 0 or left[0] < 0:
        raise ValueError("it is nested too deeply, refers to itself, or is too large")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _measure(inner, depth - 1, left)


def _set(cls: type, values: dict[str, Any], setting: str) -> None:
    """Put one KEY=VALUE into `values`; dots in the key lead into mappings, the value is YAML."""
    key, equals, text = setting.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set '{setting}': expected KEY=VALUE, for instance steps=100.")
    try:
        value = _load_yaml(text)
    except ValueError as error:
        raise UserError(f"--set '{setting}': the value is not YAML ({_said(error)}).") from None
    known = sorted(f.name for f in dataclasses.fields(cls))
    if path[0] not in known:
        raise UserError(f"--set: unknown key '{path[0]}'; known keys are {', '.join(known)}.")
    for name in path[:-1]:
        inner = values.get(name)
        values[name] = dict(inner) if isinstance(inner, dict) else {}
        values = values[name]
    values[path[-1]] = value


def from_mapping(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build dataclass `cls` from a mapping, recursing into dataclass fields. `where` names the source in errors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {_shown(_name(key))}; known keys are {', '.join(sorted(fields))}.")
    built: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _convert(values[name], hints[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: key '{name}' is missing.")
    try:
        return cls(**built)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping.")
        return from_mapping(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _convert(value, options[0], where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(
                f"{where} must be one of {', '.join(map(str, typing.get_args(hint)))}, not {_shown(value)}."
            )
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list.")
        return [_convert(v, typing.get_args(hint)[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping.")
        named = {_name(k): v for k, v in value.items()}
        return {k: _convert(v, typing.get_args(hint)[1], f"{where}.{k[:SHOWN]}") for k, v in named.items()}
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} is too large.") from None
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{where} must be of type {hint.__name__}, not {_shown(value)}.")
    return value


def _name(key: Any) -> str:
    return key if isinstance(key, str) else _shown(key)


def _shown(value: Any) -> str:
    """The value as an error shows it, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a very large number"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _said(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 4 * SHOWN else f"{text[: 4 * SHOWN]}…"
