"""Growing a tree level by level, and what must hold for every drafter that does."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import TEXTS
from ctc_drafter.drafters import DRAFTERS, TrainableDrafter, load_drafter
from ctc_drafter.drafters.rollout import grow
from ctc_drafter.target import Target
from ctc_drafter.tree import DraftTree
from helpers import plain, run

KINDS: dict[str, dict[str, Any]] = {
    "eagle": {"kind": "eagle"},
    "eagle, CTC": {"kind": "eagle", "ctc_weight": 0.5},
    "eagle, few tokens": {"kind": "eagle", "vocabulary": 90, "heads": 4, "kv_heads": 2},
    "hydra": {"kind": "hydra"},
    "hydra, few tokens": {"kind": "hydra", "vocabulary": 90, "layers": 2},
}


def lively(target: Target, kind: str, **config: Any) -> Any:
    """A drafter whose parameters are all random: what starts at zero or one would hide mistakes."""
    torch.manual_seed(1)
    cls: Any = DRAFTERS[kind]
    drafter: Any = cls(cls.config_class(**{"steps": 4, "beam": 6, **config}), target)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for head in getattr(drafter, "heads", []):
            head.norm.weight.mul_(2.5)  # surer of itself, so that trees grow deep
    drafter.fit_vocabulary(torch.randint(0, 1000, (target.vocab_size,)))
    drafter.prepare()
    return drafter


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def drafter(request: pytest.FixtureRequest, target: Target) -> Any:
    return lively(target, **request.param)


def batch_for(drafter: TrainableDrafter, rows: int = 3, length: int = 24) -> dict[str, torch.Tensor]:
    """Random features and tokens; labels are the tokens after the root, some of them cut short."""
    torch.manual_seed(2)
    ids = drafter.kept[torch.randint(0, len(drafter.kept), (rows, length))]
    anchors = torch.randint(0, length - 8, (rows, 5))
    labels = ids[torch.arange(rows)[:, None, None], anchors[..., None] + 2 + torch.arange(4)]
    labels[0, 0, 1:] = -100
    labels[1, 2, 3:] = -100
    features = torch.randn(rows, length, drafter.target.hidden_size)
    possible = torch.ones(rows, length, dtype=torch.bool)
    return {"features": features, "token_ids": ids, "anchors": anchors, "labels": labels, "possible": possible}


def path_to(tree: DraftTree, node: int, row: int = 0) -> list[int]:
    """The tokens from the root to a node."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return path


# ---------------------------------------------------------------- growing


class Recurrent:
    """A tiny model: a state that each token changes, and a distribution over K tokens read from it."""

    def __init__(self, tokens: int, batch: int, width: int = 3) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.embedding = torch.randn(100, width, generator=generator, dtype=torch.float64)
        self.change = torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.read = 2 * torch.randn(width, tokens, generator=generator, dtype=torch.float64)
        self.root = torch.randn(batch, 1, width, generator=generator, dtype=torch.float64)
        self.kept = torch.arange(tokens) * 2 + 11

    def say(self, state: torch.Tensor) -> torch.Tensor:
        return (state @ self.read).log_softmax(-1)

    def step(self, state: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return torch.tanh(state @ self.change + self.embedding[token])

    def expand(
        self, state: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.step(state.gather(1, parents[..., None].expand(-1, -1, state.shape[2])), tokens)
        return self.say(state), state

    def grow(self, **sizes: int) -> DraftTree:
        return grow(self.say(self.root)[:, 0], self.root, self.expand, self.kept, **sizes)

    def log_prob(self, path: tuple[int, ...], row: int) -> float:
        state, total = self.root[row, 0], 0.0
        for token in path:
            total += float(self.say(state)[(token - 11) // 2])
            state = self.step(state, torch.tensor(token))
        return total

    def prefixes(self, levels: int, row: int) -> dict[tuple[int, ...], float]:
        """Every prefix of at most `levels` tokens, and its log probability."""
        kept = self.kept.tolist()
        paths = itertools.chain.from_iterable(itertools.product(kept, repeat=n) for n in range(1, levels + 1))
        return {path: self.log_prob(path, row) for path in paths}


def found(tree: DraftTree, row: int) -> dict[tuple[int, ...], float]:
    """Paths of the nodes that are not padding, and their log probabilities."""
    assert tree.log_probs is not None
    nodes = [i for i in range(tree.budget) if tree.log_probs[row, i] > -math.inf]
    paths = {tuple(path_to(tree, i, row)): float(tree.log_probs[row, i]) for i in nodes}
    assert len(paths) == len(nodes)
    return paths


@pytest.mark.parametrize("budget", [1, 2, 7, 30])
@pytest.mark.parametrize(("tokens", "levels"), [(2, 5), (5, 4), (40, 2)])
def test_a_wide_beam_finds_the_most_probable_prefixes(tokens: int, levels: int, budget: int) -> None:
    model = Recurrent(tokens, batch=2)
    tree = model.grow(budget=budget, levels=levels, beam=budget)
    tree.check()
    for row in range(2):
        everything = model.prefixes(levels, row)
        best = sorted(everything, key=lambda path: -everything[path])[:budget]
        got = found(tree, row)
        assert set(got) == set(best)
        for path in best:
            assert got[path] == pytest.approx(everything[path], abs=1e-9)


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_a_narrow_beam_expands_the_most_probable_of_each_level(beam: int) -> None:
    model = Recurrent(5, batch=1)
    everything = model.prefixes(4, 0)
    level = [path for path in everything if len(path) == 1]
    candidates = list(level)
    for _ in range(3):
        expanded = sorted(level, key=lambda path: -everything[path])[:beam]
        level = [path + (token,) for path in expanded for token in model.kept.tolist()]
        candidates += level
    best = sorted(candidates, key=lambda path: -everything[path])[:12]
    tree = model.grow(budget=12, levels=4, beam=beam)
    tree.check()
    assert set(found(tree, 0)) == set(best)


def test_more_budget_than_prefixes_is_padded() -> None:
    tree = Recurrent(2, batch=2).grow(budget=20, levels=3, beam=20)
    tree.check()
    assert tree.budget == 20 and all(len(found(tree, row)) == 14 for row in range(2))


def test_certain_tokens_keep_their_parents() -> None:
    """Where a child is as probable as its parent, the parent comes first."""
    sure = torch.full((1, 4), -math.inf)
    sure[0, 2] = 0.0

    def expand(state: None, parents: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sure.expand(1, tokens.shape[1], 4), None

    for budget in range(1, 6):
        tree = grow(sure, None, expand, torch.arange(4), budget=budget, levels=6, beam=3)
        tree.check()
        assert max(found(tree, 0), key=len) == (2,) * budget and len(found(tree, 0)) == budget


def test_numbers_that_are_none_become_padding() -> None:
    model = Recurrent(5, batch=1)
    model.read[:, 3] = torch.nan
    tree = model.grow(budget=9, levels=3, beam=4)
    tree.check()
    assert found(tree, 0) == {}


def test_shapes_do_not_depend_on_values() -> None:
    """Fake tensors have no values: whatever asked for one, or waited for the device, would fail."""
    with FakeTensorMode():
        model = Recurrent(7, batch=2)
        tree = model.grow(budget=9, levels=4, beam=3)
    assert tree.tokens.shape == (2, 9)


@pytest.mark.parametrize("sizes", [{"budget": -1}, {"levels": 0}, {"beam": 0}])
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="do not describe a tree"):
        Recurrent(3, batch=1).grow(**{"budget": 4, "levels": 2, "beam": 2, **sizes})


# ---------------------------------------------------------------- drafters


@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_trees_have_exactly_the_budget(drafter: Any, budget: int) -> None:
    with torch.inference_mode():
        drafter.start(10)
        for n in (4, 1, 2):
            features, tokens = torch.randn(1, n, drafter.target.hidden_size), torch.randint(0, 400, (1, n))
            tree = drafter.tree(drafter.draft(features, tokens), budget)
            tree.check()
            assert tree.tokens.shape == (1, budget)
            assert set(tree.tokens.flatten().tolist()) <= set(drafter.kept.tolist())
            assert budget == 0 or int(tree.depths.max()) <= drafter.proposed_tokens


def test_growing_leaves_no_trace(drafter: Any) -> None:
    """The same guess gives the same tree again, and what is drafted next does not depend on trees grown before."""
    features, tokens = torch.randn(1, 9, drafter.target.hidden_size), torch.randint(0, 400, (1, 9))
    with torch.no_grad():
        trees = []
        for often in (1, 3):
            drafter.start(9)
            for part in (slice(0, 5), slice(5, 9)):
                guess = drafter.draft(features[:, part], tokens[:, part])
                trees += [drafter.tree(guess, 12) for _ in range(often)]
    first, second = trees[:2]
    for want, got in ((first, trees[2]), (first, trees[4]), (second, trees[5]), (second, trees[7])):
        assert torch.equal(want.tokens, got.tokens) and torch.equal(want.log_probs, got.log_probs)


def test_speculative_decoding_is_plain_decoding(
    drafter: Any, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "stop_ids", frozenset())
    prompt = list(target.tokenizer(TEXTS[0])["input_ids"])[:12]
    answer = plain(target, prompt, 40)
    drafter.save_pretrained(tmp_path / "d")
    loaded = load_drafter(str(tmp_path / "d"), target)
    for budget in (0, 1, 16):
        out, steps = run(target, loaded, prompt, 40, budget=budget)
        assert out == answer and {s.drafted for s in steps[1:]} == {budget}


def test_round_trip(drafter: Any, target: Target, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path / "d")
    loaded: Any = load_drafter(str(tmp_path / "d"), target, dtype="float32")
    assert type(loaded) is type(drafter) and loaded.config == drafter.config
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    features, tokens = torch.randn(1, 6, target.hidden_size), torch.arange(6)[None]
    trees = []
    with torch.inference_mode():
        for each in (drafter, loaded):
            each.start(6)
            trees.append(each.tree(each.draft(features, tokens), 9))
    assert torch.equal(trees[0].tokens, trees[1].tokens) and torch.equal(trees[0].parents, trees[1].parents)


def test_gradients_reach_every_parameter(drafter: Any) -> None:
    loss, metrics = drafter.train_loss(**batch_for(drafter))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    for name, p in drafter.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in drafter.target.model.parameters())


def test_target_stays_out_of_the_parameters(drafter: Any) -> None:
    borrowed = {p.data_ptr() for p in drafter.target.model.parameters()}
    assert not borrowed & {p.data_ptr() for p in drafter.parameters()}
    stored = [v for v in drafter.state_dict().values() if v.is_floating_point()]
    assert drafter.num_parameters == sum(v.numel() for v in stored)


def test_training_overfits_one_batch(drafter: Any) -> None:
    batch = batch_for(drafter, rows=2)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    with torch.no_grad():
        before, _ = drafter.train_loss(**batch)
    for _ in range(30):
        loss, _ = drafter.train_loss(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after, metrics = drafter.train_loss(**batch)
    assert float(after) < 0.6 * float(before)
    assert 0 < float(metrics["first"]) <= 1 and 0 < float(metrics["expected_accepted"]) <= 4


def test_tree_probabilities_are_those_that_training_reports(drafter: Any) -> None:
    """A node's path, given as labels, has the tree's own probabilities."""
    target = drafter.target
    features, tokens = torch.randn(1, 10, target.hidden_size), torch.randint(0, target.vocab_size, (1, 10))
    with torch.no_grad():
        drafter.start(6)
        drafter.draft(features[:, :4], tokens[:, 1:5])
        tree = drafter.tree(drafter.draft(features[:, 4:6], tokens[:, 5:7]), 12)
        assert tree.depths.max() > 2
        for node in range(12):
            path, expected, i = path_to(tree, node), 0.0, node
            while i >= 0:
                expected, i = expected + float(tree.log_probs[0, i].exp()), int(tree.parents[0, i])
            labels = torch.tensor([[path + [-100] * (4 - len(path))]])
            everywhere = torch.ones(1, 10, dtype=torch.bool)
            _, metrics = drafter.train_loss(features, tokens, torch.tensor([[5]]), labels, everywhere)
            assert float(metrics["expected_accepted"]) == pytest.approx(expected, rel=1e-4)


def test_labels_that_are_not_drafted_end_the_label(target: Target) -> None:
    """Tokens outside the kept ones cannot be proposed: they and what follows them do not count."""
    for kind in ("eagle", "hydra"):
        drafter = lively(target, kind, vocabulary=90)
        batch = batch_for(drafter)
        with torch.no_grad():
            batch["labels"][:, :, 1:] = -100
            short = drafter.train_loss(**batch)[1]
            batch["labels"][:, :, 1] = next(t for t in range(target.vocab_size) if t not in drafter.kept.tolist())
            batch["labels"][:, :, 2:] = drafter.kept[3]
            assert drafter.train_loss(**batch)[1] == short
            assert 0 < float(short["first"]) == pytest.approx(float(short["expected_accepted"]))
