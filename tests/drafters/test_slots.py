"""The parallel drafters: training and inference compute the same, and training reaches every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ctc_drafter.drafters import DRAFTERS, CTCConfig, CTCDrafter, MedusaConfig, ParallelConfig, slots
from ctc_drafter.drafters.slots import SlotDrafter
from ctc_drafter.errors import UserError
from ctc_drafter.target import LAST, Target
from ctc_drafter.tree import DraftTree

KINDS: dict[str, dict[str, Any]] = {
    "label-context": {"context_rank": 8},
    "label-context, two layers": {"context_rank": 8, "layers": 2, "feature_layers": [1, LAST]},
    "label-context, label loss": {"context_rank": 8, "objective": "label"},
    "label-context, few tokens": {"context_rank": 8, "vocabulary": 90},
    "merge": {"topology": "merge"},
    "merge, few tokens": {"topology": "merge", "vocabulary": 90},
    "merge, label loss": {"topology": "merge", "objective": "label", "tree": "paths"},
    "merge, label loss, few tokens": {"topology": "merge", "objective": "label", "tree": "paths", "vocabulary": 90},
    "merge, label loss, no collapse": {"topology": "merge", "objective": "label", "tree": "slots"},
    "merge on heads": {"topology": "merge", "module": "heads"},
    "label-context on heads": {"context_rank": 8, "module": "heads"},
    "parallel": {"kind": "parallel", "slots": 4},
    "parallel, label context": {"kind": "parallel", "slots": 4, "label_context": True, "context_rank": 8},
    "parallel, few tokens": {"kind": "parallel", "slots": 4, "label_context": True, "vocabulary": 90},
    "medusa": {"kind": "medusa", "slots": 4},
    "medusa, few tokens": {"kind": "medusa", "slots": 4, "vocabulary": 90},
}


def lively(target: Target, kind: str = "ctc", **config: Any) -> SlotDrafter:
    """A drafter whose parameters are all random: what starts at zero or one would hide mistakes."""
    torch.manual_seed(1)
    cls: Any = DRAFTERS[kind]
    drafter: SlotDrafter = cls(cls.config_class(**{"slots": 5, "labels": 4, **config}), target)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    drafter.fit_vocabulary(torch.randint(0, 1000, (target.vocab_size,)))
    drafter.prepare()
    return drafter


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def drafter(request: pytest.FixtureRequest, target: Target) -> SlotDrafter:
    return lively(target, **request.param)


def batch_for(drafter: SlotDrafter, rows: int = 3, length: int = 24) -> dict[str, torch.Tensor]:
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
def test_steps_equal_the_training_pass(drafter: SlotDrafter, chunks: list[int]) -> None:
    """Pairs appended in ragged chunks give, at each anchor, the slot logits of the parallel pass."""
    target, length = drafter.target, sum(chunks)
    width = target.hidden_size * len(drafter.feature_layers)
    features, tokens = torch.randn(1, length, width), torch.randint(0, target.vocab_size, (1, length))
    with torch.no_grad():
        context = drafter.module.pairs(features, target.embedding(tokens))
        want = F.linear(drafter.module(context, torch.arange(length)[None]), drafter.head_rows())
        drafter.start(length)
        end = 0
        for n in chunks:
            new = slice(end, end := end + n)
            logits, _ = drafter.draft(features[:, new], tokens[:, new])
            got = logits if drafter.has_blank else logits[..., :-1]
            torch.testing.assert_close(got, want[:, end - 1], rtol=1e-5, atol=1e-5 * float(want.std()))


def paths_of(tree: DraftTree) -> list[list[int]]:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths: list[list[int]] = []
    for token, parent in zip(tokens, parents):
        paths.append([token] if parent < 0 else [*paths[parent], token])
    return sorted(paths)


def test_twins_draft_together_what_they_draft_alone(drafter: SlotDrafter) -> None:
    """Ragged numbers of new pairs; a twin joins later, one leaves, and they may draft alone in between."""
    target = drafter.target
    width = target.hidden_size * len(drafter.feature_layers)
    together, alone = ([drafter.twin() for _ in range(3)] for _ in range(2))
    for one in (*together, *alone):
        one.start(40)
    rounds = [({0: 7, 1: 1}, True), ({0: 2, 1: 3, 2: 9}, True), ({0: 1, 1: 1, 2: 1}, False), ({1: 4, 2: 2}, True)]
    with torch.inference_mode():
        for counts, at_once in rounds:
            pairs = [(torch.randn(1, n, width), torch.randint(0, target.vocab_size, (1, n))) for n in counts.values()]
            mine = [together[i] for i in counts]
            got = drafter.draft_together(mine, pairs) if at_once else [d.draft(*p) for d, p in zip(mine, pairs)]
            for i, (logits, root), pair in zip(counts, got, pairs):
                want, want_root = alone[i].draft(*pair)
                torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
                assert torch.equal(root, want_root)
            trees = drafter.trees_together(mine, got, 6)
            at_once = drafter.tree(tuple(torch.cat(parts) for parts in zip(*got)), 6)  # type: ignore[assignment]
            for tree, same in zip(trees, at_once.split()):  # type: ignore[attr-defined]
                assert paths_of(tree) == paths_of(same)


def test_anchors_see_no_future(drafter: SlotDrafter) -> None:
    """Features and tokens behind an anchor's root do not change its slots."""
    target = drafter.target
    features = torch.randn(1, 9, target.hidden_size * len(drafter.feature_layers))
    embedded = target.embedding(torch.randint(0, target.vocab_size, (1, 9)))
    anchors = torch.tensor([[4, 8]])
    with torch.no_grad():
        before = drafter.module(drafter.module.pairs(features, embedded), anchors)
        features[:, 5:] += 1
        after = drafter.module(drafter.module.pairs(features, embedded), anchors)
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
        tree = drafter.tree(drafter.draft(features[:, 4:6], tokens[:, 5:]), 40)
        assert tree.log_probs is not None and tree.depths.max() > 1
        for node in range(40):
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


def test_gradients_reach_every_parameter(drafter: SlotDrafter) -> None:
    loss, metrics = drafter.train_loss(**batch_for(drafter))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    names = {name for name, _ in drafter.named_parameters()}
    assert ("context_down.weight" in names) == drafter.has_context and ("blank" in names) == drafter.has_blank
    for name, p in drafter.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in drafter.target.model.parameters())


def test_training_overfits_one_batch(drafter: SlotDrafter) -> None:
    batch = batch_for(drafter, rows=2)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss, metrics = drafter.train_loss(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert 0 < float(metrics["first"]) <= 1 and 0 < float(metrics["expected_accepted"]) <= 4


def test_large_vocabularies_are_done_in_pieces(drafter: SlotDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, metrics and gradients are those of one piece."""
    batch = batch_for(drafter)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor | None]]:
        drafter.zero_grad()
        loss, metrics = drafter.train_loss(**batch)
        loss.backward()
        return loss.detach(), metrics, [p.grad for p in drafter.parameters()]

    whole = run()
    monkeypatch.setattr(slots, "MAX_LOGITS", 4 * len(drafter.head_rows()) * 10)
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-5)


def test_ignored_labels_do_not_count(drafter: SlotDrafter) -> None:
    """What stands behind -100 changes nothing; a real label does."""
    batch = batch_for(drafter)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[4]), -100, -100, -100])
    first, _ = drafter.train_loss(**batch)
    batch["labels"][0, 0] = torch.tensor([int(drafter.kept[9]), -100, -100, -100])
    assert drafter.train_loss(**batch)[0] != first


def test_repeated_labels_that_no_path_can_spell(drafter: SlotDrafter) -> None:
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
    assert loss.item() == 0 and float(metrics["expected_accepted"]) == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in drafter.parameters())


def test_target_stays_out_of_the_parameters(drafter: SlotDrafter) -> None:
    borrowed = {p.data_ptr() for p in drafter.target.model.parameters()}
    assert not borrowed & {p.data_ptr() for p in drafter.parameters()}
    stored = [v for v in drafter.state_dict().values() if v.is_floating_point()]
    assert drafter.num_parameters == sum(v.numel() for v in stored)


# ---------------------------------------------------------------- trees


@pytest.mark.parametrize("budget", [0, 1, 7, 16, 80])
def test_trees_have_exactly_the_budget(drafter: SlotDrafter, budget: int) -> None:
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


# ---------------------------------------------------------------- what defines each method


def slots_of(drafter: SlotDrafter, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        drafter.start(20)
        return drafter.draft(features, tokens)[0][0]


def test_medusa_heads_are_independent(target: Target) -> None:
    """A head depends on its own block and on the newest feature; not on other heads, the root, or the past."""
    drafter = lively(target, "medusa", slots=4)
    features, tokens = torch.randn(1, 6, target.hidden_size), torch.randint(0, 300, (1, 6))
    before = slots_of(drafter, features, tokens)
    earlier = features.clone()
    earlier[:, :-1] += 1
    torch.testing.assert_close(slots_of(drafter, earlier, (tokens + 1) % 300), before)
    with torch.no_grad():
        drafter.module.blocks.weight.unflatten(0, (4, -1))[2] += 0.5
    changed = (slots_of(drafter, features, tokens) - before).nan_to_num().abs().amax(-1) > 1e-4
    assert changed.tolist() == [False, False, True, False]


def test_untrained_medusa_heads_say_what_the_target_says(target: Target) -> None:
    drafter: Any = DRAFTERS["medusa"](MedusaConfig(), target)
    drafter.prepare()
    features = torch.randn(1, 3, target.hidden_size)
    slots = slots_of(drafter, features, torch.tensor([[1, 2, 3]]))[:, :-1]
    torch.testing.assert_close(slots, target.head(features[0, -1:]).expand(5, -1))


@pytest.mark.parametrize("kind", ["parallel", "ctc"])
def test_attention_slots_see_the_root_and_the_past(kind: str, target: Target) -> None:
    drafter = lively(target, kind, slots=4)
    features, tokens = torch.randn(1, 6, target.hidden_size), torch.randint(0, 299, (1, 6))
    before = slots_of(drafter, features, tokens)
    other = tokens.clone()
    other[0, -1] += 1
    earlier = features.clone()
    earlier[:, 0] += 1
    for changed in (slots_of(drafter, features, other), slots_of(drafter, earlier, tokens)):
        assert ((changed - before).nan_to_num().abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("name", ["parallel", "medusa", "merge, label loss, no collapse"])
def test_trees_without_collapse_hold_products_of_slot_probabilities(name: str, target: Target) -> None:
    drafter = lively(target, **{**KINDS[name], "pool": target.vocab_size})
    with torch.no_grad():
        drafter.start(20)
        guess = drafter.draft(torch.randn(1, 5, target.hidden_size), torch.randint(0, 300, (1, 5)))
        tree = drafter.tree(guess, 16)
    slots = guess[0][0, :, :-1].double().log_softmax(-1)
    assert tree.log_probs is not None and tree.depths.max() > 1
    for node in range(16):
        path, i = [], node
        while i >= 0:
            path.insert(0, int(tree.tokens[0, i]))
            i = int(tree.parents[0, i])
        want = sum(float(slots[k, token]) for k, token in enumerate(path))
        assert float(tree.log_probs[0, node]) == pytest.approx(want, abs=1e-4)


def test_without_label_context_the_draft_ignores_what_was_said(target: Target) -> None:
    """With it, the second token's distribution depends on the first; without it, it does not."""
    for context in (False, True):
        drafter = lively(target, "parallel", slots=4, label_context=context, pool=target.vocab_size)
        labels = torch.randint(0, 300, (1, 2, 4))
        labels[0, 1] = labels[0, 0]
        labels[0, 1, 0] = (labels[0, 0, 0] + 1) % 300
        with torch.no_grad():
            flat, rows, lengths = drafter.label_rows(labels)
            logits = torch.randn(1, 4, target.vocab_size).expand(2, -1, -1)
            (scores,) = drafter.prefix_scores(logits, torch.tensor([7, 7]), flat, rows, lengths)  # type: ignore[operator]
        second = scores[:, 1] - scores[:, 0]
        assert (abs(float(second[0] - second[1])) > 1e-4) == context


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
        {"reach": 1.5},
    ],
)
def test_impossible_configs(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CTCConfig(**bad)


def test_impossible_configs_of_the_others() -> None:
    for config, bad in (
        (ParallelConfig, {"slots": 6}),
        (MedusaConfig, {"module": "attention"}),
        (MedusaConfig, {"label_context": True}),
        (CTCConfig, {"module": "heads", "feature_layers": [1, -1]}),
        (CTCConfig, {"module": "heads", "layers": 2}),
    ):
        with pytest.raises(ValueError):
            config(**bad)


@pytest.mark.parametrize("bad", [{"heads": 3}, {"heads": 4, "kv_heads": 3}, {"heads": 64}])
def test_heads_that_do_not_divide(bad: dict[str, Any], target: Target) -> None:
    with pytest.raises(UserError, match="heads"):
        CTCDrafter(CTCConfig(**bad), target)
