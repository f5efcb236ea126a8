"""What a generation keeps in memory beside the weights: keys and values of target and drafter, position by position."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from .errors import UserError
from .words import byte_size

if TYPE_CHECKING:
    from .drafters import Drafter
    from .target import Target

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes in `2GiB`, `512 MB`, `1000000`. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", text.lower())
    amount = math.inf if found is None else float(found[1]) * _UNITS[found[2] or ""]
    if math.isinf(amount):  # as hundreds of digits are
        raise UserError(f"'{text}' is no amount of memory; write it like 2GiB or 512MiB.")
    return int(amount)


def position_bytes(target: Target, drafter: Drafter) -> int:
    """Bytes of one position of one row, in the target's cache and the drafter's."""
    return target.position_bytes + drafter.position_bytes


def spare(budget: int) -> int:
    """Positions beyond the text: the last pass may overshoot by a whole draft."""
    return budget + 1


def check_fits(target: Target, drafter: Drafter, prompt: int, answer: int, budget: int, limit: int | None) -> None:
    """Raise UserError if a prompt and an answer of so many tokens could need more than `limit` bytes (None: any)."""
    if limit is None:
        return
    each = position_bytes(target, drafter)
    needed = (prompt + answer + spare(budget)) * each
    if needed > limit:
        raise UserError(
            f"A prompt of {prompt} tokens and an answer of up to {answer} may need {byte_size(needed)} of keys and "
            f"values and the memory limit is {byte_size(limit)}, which holds {limit // each} positions; "
            "shorten them or raise the limit."
        )


def row_context(target: Target, drafter: Drafter, rows: int, budget: int, limit: int) -> int:
    """The most positions of each of so many rows that fit into `limit` bytes together. Raises UserError if none do."""
    each = position_bytes(target, drafter)
    context = limit // (rows * each) - spare(budget)
    if context < 1:
        raise UserError(
            f"A memory limit of {byte_size(limit)} holds {limit // each} positions of '{target.name}', too few for "
            f"{rows} rows with drafts of {budget}; raise it or allow fewer rows."
        )
    return context
