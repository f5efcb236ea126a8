"""What can be said of the door to vLLM without vLLM; the rest is tests/vllm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ctc_drafter.errors import UserError
from ctc_drafter.integrations import vllm


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_the_tested_release_is_taken(version: str) -> None:
    vllm.check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.3.2", "1.0.0", "0.321.0"])
def test_another_release_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(UserError, match=rf"inside vLLM 0\.32, and {version} is installed; pip install 'vllm==0\.32"):
        vllm.check_version(version)


def test_options() -> None:
    assert vllm.read_options({"ctc_drafter": {"drafter": "ctc", "budget": 4}}).budget == 4
    for missing in (None, {}, {"ctc_drafter": {}}, {"ctc_drafter": "ctc"}):
        with pytest.raises(UserError, match="not told which drafter"):
            vllm.read_options(missing)
    with pytest.raises(UserError, match="unknown key 'bugdet'"):
        vllm.read_options({"ctc_drafter": {"drafter": "ctc", "bugdet": 4}})
    with pytest.raises(UserError, match="budget must be at least 1"):
        vllm.read_options({"ctc_drafter": {"drafter": "ctc", "budget": 0}})


def test_a_setup_that_was_not_tried_is_refused() -> None:
    plain = {"pipeline_parallel_size": 1, "distributed_executor_backend": "mp"}
    vllm.check_setup(SimpleNamespace(**plain))
    with pytest.raises(UserError, match="pipeline"):
        vllm.check_setup(SimpleNamespace(**{**plain, "pipeline_parallel_size": 2}))
    with pytest.raises(UserError, match="external_launcher"):
        vllm.check_setup(SimpleNamespace(**{**plain, "distributed_executor_backend": "external_launcher"}))
