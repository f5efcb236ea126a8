"""The Hydra drafter: each head reads the tokens before its own and nothing later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ctc_drafter.drafters import HydraConfig, HydraDrafter
from ctc_drafter.target import Target
from test_rollout import batch_for, lively, path_to

KINDS: dict[str, dict[str, Any]] = {"one block": {}, "two blocks, few tokens": {"layers": 2, "vocabulary": 90}}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def drafter(request: pytest.FixtureRequest, target: Target) -> HydraDrafter:
    made: HydraDrafter = lively(target, "hydra", **request.param)
    return made


def distribution(drafter: HydraDrafter, k: int, feature: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Log probabilities of the k-th token after the root (K,), written out: feature (width,); tokens: root and on."""
    parts = [feature, *(drafter.target.embedding.weight[t] for t in tokens[:k])]
    normed = torch.cat([p / (p.square().mean() + 1e-6).sqrt() for p in parts])
    head = drafter.heads[k - 1]
    x = head.fuse.weight @ normed
    for layer in head.layers:
        x = x + F.silu(layer.weight @ x + layer.bias)
    x = x / (x.square().mean() + 1e-6).sqrt() * head.norm.weight
    out: torch.Tensor = F.linear(x, drafter.kept_head()).log_softmax(-1)
    return out


def test_tree_probabilities_are_the_heads_own(drafter: HydraDrafter) -> None:
    """Head by head along every branch."""
    features, tokens = torch.randn(1, 5, drafter.target.hidden_size), torch.tensor([[3, 1, 4, 1, 59]])
    with torch.no_grad():
        tree = drafter.tree(drafter.draft(features, tokens), 24)
        assert tree.log_probs is not None and tree.depths.max() == 4
        for node in range(24):
            path, total = path_to(tree, node), 0.0
            for k, token in enumerate(path, 1):
                said = distribution(drafter, k, features[0, -1], [59, *path])
                total += float(said[drafter.place[token]])
            assert float(tree.log_probs[0, node]) == pytest.approx(total, abs=1e-4)


def test_only_the_newest_pair_is_read(drafter: HydraDrafter) -> None:
    features, tokens = torch.randn(1, 5, drafter.target.hidden_size), torch.tensor([[3, 1, 4, 1, 59]])
    with torch.no_grad():
        torch.testing.assert_close(drafter.draft(features, tokens), drafter.draft(features[:, -1:], tokens[:, -1:]))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_head_reads_the_tokens_before_its_own(drafter: HydraDrafter, k: int) -> None:
    """Changing token i (0: the root) moves head k's probability of one and the same label if and only if i < k."""
    feature, said = torch.randn(1, 6, drafter.target.hidden_size), drafter.kept[torch.tensor([3, 5, 7, 9])].tolist()

    def of_head_k(root: int, labels: list[int]) -> float:
        """Head k's log probability of its label, as training computes it: the loss of k labels less that of k - 1."""
        ids = torch.tensor([[1, 2, root, *labels[:3]]])
        losses = []
        for count in (k - 1, k):
            given = torch.tensor([[labels[:count] + [-100] * (4 - count)]])
            everywhere = torch.ones(1, 6, dtype=torch.bool)
            loss, _ = drafter.train_loss(feature, ids, torch.tensor([[1]]), given, everywhere)
            losses.append(float(loss) * sum(0.8**i for i in range(count)))
        return losses[0] - losses[1]

    with torch.no_grad():
        want = of_head_k(11, said)
        assert want / 0.8 ** (k - 1) == pytest.approx(
            float(distribution(drafter, k, feature[0, 1], [11, *said])[drafter.place[said[k - 1]]]), abs=1e-3
        )
        assert of_head_k(12, said) != pytest.approx(want, abs=1e-3)
        for i in range(1, 5):
            other = [int(drafter.kept[30]) if j == i else t for j, t in enumerate(said, 1)]
            if i < k:
                assert of_head_k(11, other) != pytest.approx(want, abs=1e-3)
            if i > k:
                assert of_head_k(11, other) == pytest.approx(want, abs=1e-6)


def test_heads_share_no_weights(drafter: HydraDrafter) -> None:
    pointers = [p.data_ptr() for head in drafter.heads for p in head.parameters()]
    assert len(set(pointers)) == len(pointers) and len(drafter.heads) == 4


def test_ignored_labels_do_not_count(drafter: HydraDrafter) -> None:
    batch = batch_for(drafter)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[4]), -100, -100, -100])
    first, _ = drafter.train_loss(**batch)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[9]), -100, -100, -100])
    assert drafter.train_loss(**batch)[0] != first
    batch["labels"][:] = -100
    nothing, metrics = drafter.train_loss(**batch)
    nothing.backward()
    assert float(nothing.detach()) == 0 and float(metrics["expected_accepted"]) == 0
    assert all(torch.isfinite(p.grad).all() for p in drafter.parameters() if p.grad is not None)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"layers": 0}, {"beam": 0}, {"decay": 0.0}, {"vocabulary": -1}])
def test_impossible_configs(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        HydraConfig(**bad)
