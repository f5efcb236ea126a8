"""When an answer runs in circles: counted by the bench, trained against in a small target."""

from __future__ import annotations

from collections.abc import Sequence


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether, for some period p, the last max(4 p, 32) tokens repeat with period p (8 tokens four times over)."""
    for period in range(1, len(tokens) // 4 + 1):
        tail = tokens[-max(4 * period, 32) :]
        if len(tail) >= 32 and tail[period:] == tail[:-period]:
            return True
    return False
