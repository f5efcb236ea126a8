"""What JSON must hold to be read: a shape, and what in a value differs from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Kinds = tuple[type, ...]
TEXT: Kinds = (str,)
COUNT: Kinds = (int,)
REAL: Kinds = (float, int)
NUMBER: Kinds = (float, int, type(None))
ANY: Kinds = (str, object)


@dataclass(frozen=True)
class Every:
    """A list, or an object whatever its keys, with values of one shape."""

    of: type[list[Any]] | type[dict[str, Any]]
    shape: Shape
    length: int | None = None
    """How many there must be; None: any number."""


@dataclass(frozen=True)
class Maybe:
    """What may be null or left out."""

    shape: Shape


Shape = Kinds | dict[str, Any] | Every | Maybe
"""Kinds of one value; an object with keys, each with its shape (others do not matter); or one of the two above."""


def flaw(value: Any, shape: Shape, name: str) -> str | None:
    """In words, the first thing in `value`, called `name`, that is missing or of another kind; None if all is there."""
    if isinstance(shape, Maybe):
        return None if value is None else flaw(value, shape.shape, name)
    other = f"its '{name}' is of another kind"
    if isinstance(shape, Every):
        if not isinstance(value, shape.of):
            return other
        inner = list(value.values() if isinstance(value, dict) else value)
        if shape.length not in (None, len(inner)):
            return other
        return next((found for part in inner if (found := flaw(part, shape.shape, name))), None)
    if not isinstance(shape, dict):
        return None if is_of(value, shape) else other
    if not isinstance(value, dict):
        return other
    for key, part in shape.items():
        inside = f"{name}.{key}" if name else key
        if key not in value and not isinstance(part, Maybe):
            return f"it has no '{inside}'"
        if found := flaw(value.get(key), part, inside):
            return found
    return None


def is_of(value: Any, kinds: Kinds) -> bool:
    """Whether a value is of one of these kinds; a number must be finite, and as a float too."""
    if isinstance(value, bool):
        return object in kinds
    if isinstance(value, (int, float)) and not (abs(value) < 2**63 and math.isfinite(value)):
        return False
    return isinstance(value, kinds)
