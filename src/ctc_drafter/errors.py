"""The one exception family whose message is meant for the user: one sentence, what, where, what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in input or environment. The CLI prints its message as is and exits with code 2."""
