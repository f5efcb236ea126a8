"""The CTC drafter: training and inference compute the same, and training reaches every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctc_drafter.drafters import CTCConfig, CTCDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import LAST, Target

KINDS: dict[str, dict[str, Any]] = {
    "label-context": {"context_rank": 8},
    "label-context, two layers": {"context_rank": 8, "layers": 2, "feature_layers": [1, LAST]},
    "label-context, label loss": {"context_rank": 8, "objective": "label"},
    "label-context, few tokens": {"context_rank": 8, "vocabulary": 90},
    "merge": {"topology": "merge"},
    "merge, few tokens": {"topology": "merge", "vocabulary": 90},
    "merge, label loss": {"topology": "merge", "objective": "label", "tree": "paths"},
    "merge, label loss, few tokens": {"topology": "merge", "objective": "label", "tree": "paths", "vocabulary": 90},
}


def lively(target: Target, **config: Any) -> CTCDrafter:
    """A drafter whose parameters are all random: what starts at zero or one would hide mistakes."""
    torch.manual_seed(1)
    drafter = CTCDrafter(CTCConfig(**{"slots": 5, "labels": 4, **config}), target)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    drafter.fit_vocabulary(torch.randint(0, 1000, (target.vocab_size,)))
    drafter.prepare()
    return drafter


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def drafter(request: pytest.FixtureRequest, target: Target) -> CTCDrafter:
    return lively(target, **request.param)


def batch_for(drafter: CTCDrafter, rows: int = 3, length: int = 24) -> dict[str, torch.Tensor]:
    """Random features and tokens; labels are the tokens after the root, some of them cut short."""
    torch.manual_seed(2)
    width = drafter.target.hidden_size * len(drafter.feature_layers)
    ids = torch.randint(0, drafter.target.vocab_size, (rows, length))
    anchors = torch.randint(0, length - 6, (rows, 5))
    labels = ids[torch.arange(rows)[:, None, None], anchors[..., None] + 2 + torch.arange(4)]
    labels = drafter.kept[labels % len(drafter.kept)]
    labels[0, 0, 1:] = -100
    labels[1, 2, 3:] = -100
    features, possible = torch.randn(rows, length, width), torch.ones(rows, length, dtype=torch.bool)
    return {"features": features, "token_ids": ids, "anchors": anchors, "labels": labels, "possible": possible}


# ---------------------------------------------------------------- one computation, two ways


@pytest.mark.parametrize("chunks", [[1] * 11, [7, 1, 3], [2, 4, 1, 1, 3], [11]])
def test_steps_equal_the_training_pass(drafter: CTCDrafter, chunks: list[int]) -> None:
    """Pairs appended in ragged chunks give, at each anchor, the slots of the parallel pass."""
    target, length = drafter.target, sum(chunks)
    width = target.hidden_size * len(drafter.feature_layers)
    features, tokens = torch.randn(1, length, width), torch.randint(0, target.vocab_size, (1, length))
    with torch.no_grad():
        context = drafter.module.context(features, target.embedding(tokens))
        want = drafter.module(context, torch.arange(length)[None])
        drafter.start(length)
        end = 0
        for n in chunks:
            new = slice(end, end := end + n)
            slots = drafter.module.step(drafter.module.context(features[:, new], target.embedding(tokens[:, new])))
            torch.testing.assert_close(slots, want[:, end - 1], rtol=1e-5, atol=1e-5 * float(want.std()))


def test_anchors_see_no_future(drafter: CTCDrafter) -> None:
    """Features and tokens behind an anchor's root do not change its slots."""
    target = drafter.target
    features = torch.randn(1, 9, target.hidden_size * len(drafter.feature_layers))
    embedded = target.embedding(torch.randint(0, target.vocab_size, (1, 9)))
    anchors = torch.tensor([[4, 8]])
    with torch.no_grad():
        before = drafter.module(drafter.module.context(features, embedded), anchors)
        features[:, 5:] += 1
        after = drafter.module(drafter.module.context(features, embedded), anchors)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("kind", [name for name in KINDS if "label loss" not in name])
def test_tree_probabilities_are_those_that_training_raises(kind: str, target: Target) -> None:
    """With the whole vocabulary in the pool, the loss of a node's path has the tree's own probabilities."""
    drafter = lively(target, **KINDS[kind], pool=target.vocab_size)
    tokens = torch.randint(0, target.vocab_size, (1, 7))
    features = torch.randn(1, 7, target.hidden_size * len(drafter.feature_layers))
    with torch.no_grad():
        drafter.start(6)
        drafter.draft(features[:, :4], tokens[:, 1:5])
        tree = drafter.tree(drafter.draft(features[:, 4:6], tokens[:, 5:]), 12)
        assert tree.log_probs is not None and tree.depths.max() > 1
        for node in range(12):
            path, expected, i = [], 0.0, node
            while i >= 0:
                path.insert(0, int(tree.tokens[0, i]))
                expected += float(tree.log_probs[0, i].exp())
                i = int(tree.parents[0, i])
            labels = torch.tensor([[path + [-100] * (4 - len(path))]])
            everywhere = torch.ones(1, 7, dtype=torch.bool)
            _, metrics = drafter.train_loss(features, tokens, torch.tensor([[5]]), labels, everywhere)
            assert float(metrics["expected_accepted"]) == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- training


def test_gradients_reach_every_parameter(drafter: CTCDrafter) -> None:
    loss, metrics = drafter.train_loss(**batch_for(drafter))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    names = {name for name, _ in drafter.named_parameters()}
    assert {"module.feature_norm", "blank", "module.slot_embedding"} <= names
    assert ("context_down.weight" in names) == drafter.has_context
    for name, p in drafter.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in drafter.target.model.parameters())


def test_training_overfits_one_batch(drafter: CTCDrafter) -> None:
    batch = batch_for(drafter, rows=2)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss, metrics = drafter.train_loss(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert 0 < float(metrics["first"]) <= 1 and 0 < float(metrics["expected_accepted"]) <= 4


def test_ignored_labels_do_not_count(drafter: CTCDrafter) -> None:
    """What stands behind -100 changes nothing; a real label does."""
    batch = batch_for(drafter)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[4]), -100, -100, -100])
    first, _ = drafter.train_loss(**batch)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[9]), -100, -100, -100])
    assert drafter.train_loss(**batch)[0] != first


def test_repeated_labels_that_no_path_can_spell(drafter: CTCDrafter) -> None:
    """Four equal labels need seven merging slots and there are five: finite all the same."""
    batch = batch_for(drafter)
    batch["labels"][0] = 7
    loss, metrics = drafter.train_loss(**batch)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) for v in metrics.values())
    assert all(torch.isfinite(p.grad).all() for p in drafter.parameters() if p.grad is not None)


def test_labels_that_are_not_drafted_end_the_label(target: Target) -> None:
    """Tokens outside the kept ones cannot be proposed: they and what follows them carry no loss."""
    drafter = lively(target, vocabulary=90)
    outside = next(t for t in range(target.vocab_size) if t not in drafter.kept.tolist())
    batch = batch_for(drafter)
    batch["labels"][:, :, 1] = outside
    mixed, _ = drafter.train_loss(**batch)
    batch["labels"][:, :, 1:] = -100
    assert drafter.train_loss(**batch)[0] == mixed
    batch["labels"][:, :, 0] = outside
    loss, metrics = drafter.train_loss(**batch)
    loss.backward()
    assert float(loss) == 0 and float(metrics["expected_accepted"]) == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in drafter.parameters())


def test_target_stays_out_of_the_parameters(drafter: CTCDrafter) -> None:
    borrowed = {p.data_ptr() for p in drafter.target.model.parameters()}
    assert not borrowed & {p.data_ptr() for p in drafter.parameters()}
    stored = [v for v in drafter.state_dict().values() if v.is_floating_point()]
    assert drafter.num_parameters == sum(v.numel() for v in stored)


# ---------------------------------------------------------------- trees


@pytest.mark.parametrize("budget", [0, 1, 7, 16, 80])
def test_trees_have_exactly_the_budget(drafter: CTCDrafter, budget: int) -> None:
    with torch.no_grad():
        drafter.start(10)
        width = drafter.target.hidden_size * len(drafter.feature_layers)
        for n in (4, 1, 2):
            tree = drafter.tree(drafter.draft(torch.randn(1, n, width), torch.randint(0, 400, (1, n))), budget)
            tree.check()
            assert tree.tokens.shape == (1, budget)
            drafted = tree.tokens if tree.log_probs is None else tree.tokens[tree.log_probs.isfinite()]
            assert set(drafted.flatten().tolist()) <= set(drafter.kept.tolist())  # blank is no token
            assert budget == 0 or int(tree.depths.max()) <= drafter.proposed_tokens


@pytest.mark.parametrize("topology", ["merge", "label-context"])
def test_budget_larger_than_all_that_can_be_said(topology: str, target: Target) -> None:
    drafter = lively(target, slots=1, labels=1, topology=topology)
    with torch.no_grad():
        drafter.start(4)
        tree = drafter.tree(drafter.draft(torch.randn(1, 4, target.hidden_size), torch.tensor([[1, 2, 3, 4]])), 600)
    tree.check()
    assert tree.budget == 600 and set(tree.tokens[0].tolist()) == set(range(target.vocab_size))


# ---------------------------------------------------------------- config


@pytest.mark.parametrize(
    "bad",
    [
        {"layers": 0},
        {"slots": 0},
        {"labels": 9},
        {"labels": 0},
        {"tree": "paths"},
        {"feature_layers": []},
        {"pool": 0},
        {"path_count": 0},
        {"path_top_k": -1},
        {"context_rank": 0},
        {"decay": -0.5},
    ],
)
def test_impossible_configs(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CTCConfig(**bad)


@pytest.mark.parametrize("bad", [{"heads": 3}, {"heads": 4, "kv_heads": 3}, {"heads": 64}])
def test_heads_that_do_not_divide(bad: dict[str, Any], target: Target) -> None:
    with pytest.raises(UserError, match="heads"):
        CTCDrafter(CTCConfig(**bad), target)
