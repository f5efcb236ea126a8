"""Memory for keys and values stays within what is allowed, and what would not is refused in words."""

from __future__ import annotations

import pytest

from ctc_drafter.batch import Batch
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter, NoDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.memory import parse_bytes, position_bytes
from ctc_drafter.target import Target


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5k", 1500), ("1000000", 10**6), ("3mb", 3 * 10**6), ("0", 0)],
)
def test_amounts_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "2TiB", "1 2", "9" * 400, "9" * 308 + "GiB"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write it like 2GiB"):
        parse_bytes(text)


def test_a_position_costs_what_the_caches_hold(target: Target, drafter: Drafter) -> None:
    config = target.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4
    assert target.position_bytes == own
    layer = drafter.module.layers[0]
    numbers = 2 * len(drafter.module.layers) * layer.kv_heads * layer.dim
    assert drafter.position_bytes == numbers * drafter.dtype.itemsize
    assert NoDrafter().position_bytes == 0


def test_generate_refuses_beyond_the_limit_and_runs_within(target: Target, drafter: Drafter) -> None:
    limit = (3 + 10 + 4 + 1) * position_bytes(target, drafter)
    steps = list(generate(target, drafter, [5, 6, 7], max_new_tokens=10, budget=4, memory_limit=limit))
    assert steps[-1].finish is not None
    with pytest.raises(UserError, match="holds 17 positions"):
        next(generate(target, drafter, [5, 6, 7], max_new_tokens=10, budget=4, memory_limit=limit - 1))


def test_a_batch_stays_within_the_limit(target: Target, drafter: Drafter) -> None:
    each = position_bytes(target, drafter)
    limit = 3 * 30 * each + each // 2
    batch = Batch(target, drafter, rows=3, budget=4, adaptive=False, memory_limit=limit)
    assert batch.context == 25
    with pytest.raises(UserError, match="25 positions of a row"):
        batch.add([5] * 16, max_new_tokens=10)
    for _ in range(3):
        batch.add([5] * 15, max_new_tokens=10)
    while len(batch):
        assert all(step.error is None for _, step in batch.step())
        assert batch.nbytes <= limit
    with pytest.raises(UserError, match="too few for 3 rows"):
        Batch(target, drafter, rows=3, budget=4, adaptive=False, memory_limit=14 * each)
