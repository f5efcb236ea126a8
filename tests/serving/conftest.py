from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from ctc_drafter.drafters import Drafter, LookupDrafter, NoDrafter, load_drafter
from ctc_drafter.target import Target
from live import Live, live


@pytest.fixture(scope="session")
def drafter(target: Target, drafter_folder: Path) -> Drafter:
    """For the tests' own use; the server has a twin."""
    return load_drafter(str(drafter_folder), target)


@pytest.fixture(scope="module")
def server(target: Target, drafter: Drafter) -> Iterator[Live]:
    drafters = {"tiny-ctc": drafter.twin(), "lookup": LookupDrafter(), "none": NoDrafter()}
    with live(target, drafters) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return server.client()
