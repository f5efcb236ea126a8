"""The connection to a server, apart from what is asked of it (test_remote.py)."""

from __future__ import annotations

import pytest

from ctc_drafter.training import client


def test_a_wait_ends_with_the_run() -> None:
    """A thread that waits for a busy server does not outlive its run."""
    server = client.Server("http://127.0.0.1:9/v1")
    server.stopped.set()
    with pytest.raises(client.Stopped):
        server.request("/models")
