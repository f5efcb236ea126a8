"""The EAGLE drafter: tree attention equals a sequential roll-out, and training is EAGLE-1's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ctc_drafter.drafters import EagleConfig, EagleDrafter, eagle
from ctc_drafter.errors import UserError
from ctc_drafter.target import Target
from test_rollout import batch_for, lively, path_to

KINDS: dict[str, dict[str, Any]] = {
    "one head": {},
    "grouped heads": {"heads": 4, "kv_heads": 2},
    "few tokens": {"heads": 4, "kv_heads": 1, "vocabulary": 90},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def drafter(request: pytest.FixtureRequest, target: Target) -> EagleDrafter:
    made: EagleDrafter = lively(target, "eagle", **request.param)
    return made


def random_text(drafter: EagleDrafter, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    target = drafter.target
    return torch.randn(1, length, target.hidden_size), torch.randint(0, target.vocab_size, (1, length))


def predicted(drafter: EagleDrafter, features: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    """The training pass: a predicted feature for every pair."""
    module, embedding = drafter.module, drafter.target.embedding
    out: torch.Tensor = module(module.pairs(features, embedding(next_tokens)))
    return out


# ---------------------------------------------------------------- one computation, many ways


@pytest.mark.parametrize("chunks", [[1] * 11, [7, 1, 3], [2, 4, 1, 1, 3], [11]])
def test_appending_in_chunks_equals_one_pass(drafter: EagleDrafter, chunks: list[int]) -> None:
    features, tokens = random_text(drafter, sum(chunks))
    with torch.no_grad():
        want = predicted(drafter, features, tokens)
        drafter.start(sum(chunks))
        end = 0
        for n in chunks:
            new = slice(end, end := end + n)
            got = drafter.draft(features[:, new], tokens[:, new])
            torch.testing.assert_close(got[:, 0], want[:, end - 1], rtol=1e-4, atol=1e-5)


def test_tree_attention_equals_a_sequential_roll_out(drafter: EagleDrafter) -> None:
    """Along each branch, one predicted feature after another, everything computed anew each time."""
    features, tokens = random_text(drafter, 9)
    with torch.no_grad():
        drafter.start(9)
        drafter.draft(features[:, :6], tokens[:, :6])
        tree = drafter.tree(drafter.draft(features[:, 6:], tokens[:, 6:]), 24)
        assert tree.log_probs is not None and tree.depths.max() == 4
        assert len(set(tree.parents[0].tolist())) > 4  # it does branch
        for node in range(24):
            seen, said, total = features, tokens, 0.0
            for token in path_to(tree, node):
                feature = predicted(drafter, seen, said)[:, -1:]
                log_probs = F.linear(feature[0, 0], drafter.kept_head()).log_softmax(-1)
                total += float(log_probs[drafter.place[token]])
                seen, said = torch.cat([seen, feature], 1), torch.cat([said, torch.tensor([[token]])], 1)
            assert float(tree.log_probs[0, node]) == pytest.approx(total, abs=1e-3)


def test_no_position_sees_the_future(drafter: EagleDrafter) -> None:
    features, tokens = random_text(drafter, 9)
    with torch.no_grad():
        before = predicted(drafter, features, tokens)
        features[:, 5:] += 1
        tokens[:, 5:] += 1
        after = predicted(drafter, features, tokens % drafter.target.vocab_size)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


# ---------------------------------------------------------------- training


def test_the_loss_is_eagles(target: Target) -> None:
    """Smooth-L1 of the feature, and 0.1 times the cross-entropy against the target's own distribution."""
    drafter = lively(target, "eagle", noise=0.0)
    batch = batch_for(drafter)
    batch["possible"] = torch.rand(3, 24) < 0.5
    loss, _ = drafter.train_loss(**batch)
    out = predicted(drafter, batch["features"][:, :-1], batch["token_ids"][:, 1:])
    terms = []
    for row, j in batch["possible"][:, :-1].nonzero().tolist():
        mine, theirs = out[row, j], batch["features"][row, j + 1]
        distance = (mine - theirs).abs()
        smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean()
        surprise = -((target.head(theirs)).softmax(-1) * target.head(mine).log_softmax(-1)).sum()
        terms.append(smooth + 0.1 * surprise)
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_only_possible_positions_count(drafter: EagleDrafter) -> None:
    """Position 9 predicts feature 10; what comes later carries no loss."""
    batch = batch_for(drafter)
    batch["possible"][:, 10:] = False
    first, _ = drafter.train_loss(**batch)
    batch["features"][:, 11:] += 1
    assert drafter.train_loss(**batch)[0] == first
    batch["features"][:, 10] += 1
    assert drafter.train_loss(**batch)[0] != first


def test_noise_is_small_and_repeats(target: Target) -> None:
    """Noise belongs to training alone, stays below its share of the feature's size, and follows from the batch."""
    drafter, still = lively(target, "eagle", noise=0.1), lively(target, "eagle", noise=0.0)
    batch = batch_for(drafter)
    loss = drafter.train_loss(**batch)[0]
    assert loss == drafter.train_loss(**batch)[0] != still.train_loss(**batch)[0]
    with torch.no_grad():
        assert drafter.train_loss(**batch)[0] == still.train_loss(**batch)[0]
    features = batch["features"] * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    share = (drafter._noisy(features, batch["anchors"]) - features).abs() / features.square().mean(-1, True).sqrt()
    assert float(share.max()) <= 0.1001 and float(share.mean()) == pytest.approx(0.05, rel=0.05)


def test_many_logits_in_pieces(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = lively(target, "eagle")
    results = []
    for limit in (2**27, 10 * target.vocab_size):
        monkeypatch.setattr(eagle, "MAX_LOGITS", limit)
        drafter.zero_grad()
        loss, _ = drafter.train_loss(**batch_for(drafter))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in drafter.parameters())])
    for whole, pieces in zip(*results):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-6)


def test_deep_metrics_cost_a_roll_out(drafter: EagleDrafter) -> None:
    batch = batch_for(drafter)
    _, shallow = drafter.train_loss(**batch)
    with torch.no_grad():
        _, deep = drafter.train_loss(**batch)
    assert set(shallow) == {"first"} and set(deep) == {"first", "expected_accepted"}


# ---------------------------------------------------------------- the auxiliary CTC loss


def test_ctc_adds_a_blank_row(target: Target) -> None:
    names = [{n for n, _ in lively(target, "eagle", ctc_weight=w).named_parameters()} for w in (0.0, 0.5)]
    assert names[1] - names[0] == {"blank"}


@pytest.mark.parametrize("vocabulary", [0, 90])
def test_ctc_of_six_positions_against_three_labels(target: Target, vocabulary: int) -> None:
    drafter = lively(target, "eagle", ctc_weight=0.5, noise=0.0, vocabulary=vocabulary)
    batch = batch_for(drafter)
    batch["possible"][:, 14:] = False
    batch["anchors"][:, 0] = 8  # positions 8..13: the last window that fits
    batch["anchors"][:, 1] = 9
    loss, _ = drafter.train_loss(**batch)
    drafter.config.ctc_weight = 0.0
    plain, _ = drafter.train_loss(**batch)
    out = predicted(drafter, batch["features"][:, :-1], batch["token_ids"][:, 1:])
    terms = []
    for row, t in ((r, int(t)) for r in range(3) for t in batch["anchors"][r] if t <= 8):
        logits = F.linear(out[row, t : t + 6], torch.cat([drafter.kept_head(), drafter.blank]))
        labels = drafter.place[batch["token_ids"][row, t + 2 : t + 5]]
        blank = len(drafter.kept)
        one = F.ctc_loss(logits.log_softmax(-1), labels, torch.tensor(6), torch.tensor(3), blank, reduction="sum")
        terms.append(one / 3)
    assert 0 < len(terms) < 15
    torch.testing.assert_close(loss - plain, 0.5 * torch.stack(terms).mean(), rtol=1e-3, atol=1e-4)


def test_ctc_without_a_whole_window(target: Target) -> None:
    """Answers shorter than six positions carry no CTC loss; nothing breaks, not even with a text that short."""
    drafter = lively(target, "eagle", ctc_weight=0.5, noise=0.0)
    batch = batch_for(drafter)
    short = {k: v[:, :5] if k in ("features", "token_ids", "possible") else v for k, v in batch.items()}
    short["anchors"] = torch.tensor([[0, 2]] * 3)
    short["labels"] = batch["labels"][:, :2]
    loss, _ = drafter.train_loss(**short)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in drafter.parameters() if p.grad is not None)
    drafter.config.ctc_weight = 0.0
    assert drafter.train_loss(**short)[0] == loss


# ---------------------------------------------------------------- config


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"beam": 0}, {"noise": -0.1}, {"ctc_weight": -1.0}, {"vocabulary": -1}, {"heads": -1}]
)
def test_impossible_configs(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        EagleConfig(**bad)


@pytest.mark.parametrize("bad", [{"heads": 3}, {"heads": 4, "kv_heads": 3}, {"heads": 64}])
def test_heads_that_do_not_divide(bad: dict[str, Any], target: Target) -> None:
    with pytest.raises(UserError, match="heads"):
        EagleDrafter(EagleConfig(**bad), target)
