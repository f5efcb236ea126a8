"""Alignment losses against the sum over all slot paths, and their gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_drafter.lattice import loss

from .slot_paths import enumerate_context_texts, enumerate_texts, prefix_mass, random_log_probs

VOCAB = 3
LABELS = list(itertools.product(range(VOCAB), repeat=3))  # every label of length 3: all kinds of repeats


def log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf


def context_emissions(table: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V+1, N, V+1), (A, L) -> emit (A, N, L), blank (A, N, L+1)."""
    last = torch.cat([torch.full_like(labels[:, :1], table.shape[0] - 1), labels], dim=1)
    emit = torch.stack([table[u[:-1], :, y].T for u, y in zip(last, labels, strict=True)])
    return emit, torch.stack([table[u, :, -1].T for u in last])


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_ctc_loss_sums_over_all_paths(slots):
    log_probs = random_log_probs(slots, VOCAB + 1, seed=slots)
    texts = enumerate_texts(log_probs, merge=True)
    got = loss.ctc_loss(log_probs.expand(len(LABELS), -1, -1), torch.tensor(LABELS))
    expected = [-log(texts.get(label, 0.0)) if label in texts else 0.0 for label in LABELS]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_ctc_loss_counts_labels_up_to_lengths():
    log_probs = random_log_probs(4, VOCAB + 1)
    texts = enumerate_texts(log_probs, merge=True)
    labels = torch.tensor([[1, 1, 0]] * 4)
    got = loss.ctc_loss(log_probs.expand(4, -1, -1), labels, torch.tensor([0, 1, 2, 3]))
    expected = [-math.log(texts[tuple(labels[0, :k].tolist())]) for k in range(4)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_ctc_loss_of_impossible_label_is_zero_with_zero_gradient():
    logits = torch.randn(2, 3, VOCAB + 1, dtype=torch.float64, requires_grad=True)
    got = loss.ctc_loss(logits.log_softmax(-1), torch.tensor([[0, 0, 1], [0, 2, 1]]))  # "0 0 1" needs four slots
    got.sum().backward()
    assert got[0] == 0 and got[1] > 0
    assert logits.grad[0].abs().sum() == 0 and logits.grad[1].abs().sum() > 0


def test_ctc_loss_gradient():
    logits = torch.randn(2, 4, VOCAB + 1, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 1, 0], [2, 0, 2]])
    assert torch.autograd.gradcheck(lambda x: loss.ctc_loss(x.log_softmax(-1), labels), logits)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_merge_prefixes_sum_over_all_paths(slots):
    log_probs = random_log_probs(slots, VOCAB + 1, seed=10 + slots)
    texts = enumerate_texts(log_probs, merge=True)
    labels = torch.tensor(LABELS)
    emit, blank = loss.label_log_probs(log_probs.expand(len(LABELS), -1, -1), labels)
    prefix, whole = loss.merge_prefix_log_probs(emit, blank, labels)
    for row, label in enumerate(LABELS):
        assert whole[row].item() == pytest.approx(log(texts.get(label, 0.0)))
        for k in range(1, 4):
            assert prefix[row, k - 1].item() == pytest.approx(log(prefix_mass(texts, label[:k])))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_context_prefixes_sum_over_all_paths(slots):
    table = random_log_probs(VOCAB + 1, slots, VOCAB + 1, seed=20 + slots)
    texts = enumerate_context_texts(table)
    prefix, whole = loss.context_prefix_log_probs(*context_emissions(table, torch.tensor(LABELS)))
    for row, label in enumerate(LABELS):
        assert whole[row].item() == pytest.approx(log(texts.get(label, 0.0)))
        for k in range(1, 4):
            assert prefix[row, k - 1].item() == pytest.approx(log(prefix_mass(texts, label[:k])))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_whole_label_of_merge_is_ctc(seed, slots, label):
    log_probs = random_log_probs(1, slots, VOCAB + 1, seed=seed)
    labels = torch.tensor([label])
    emit, blank = loss.label_log_probs(log_probs, labels)
    prefix, whole = loss.merge_prefix_log_probs(emit, blank, labels)
    if whole.isfinite():
        torch.testing.assert_close(-whole, loss.ctc_loss(log_probs, labels))
        assert whole <= prefix[0, -1]
    else:
        assert len(label) + sum(a == b for a, b in itertools.pairwise(label)) > slots
    assert (prefix[0, 1:] <= prefix[0, :-1] + 1e-12).all() and (prefix <= 1e-12).all()


@pytest.mark.parametrize("topology", ["merge", "context"])
def test_lengths_select_the_whole_label(topology):
    labels = torch.tensor([[2, 2, 1]] * 4)
    lengths = torch.arange(4)
    table = random_log_probs(VOCAB + 1, 4, VOCAB + 1)
    if topology == "merge":
        texts = enumerate_texts(table[0], merge=True)
        emit, blank = loss.label_log_probs(table[0].expand(4, -1, -1), labels)
        _, whole = loss.merge_prefix_log_probs(emit, blank, labels, lengths)
    else:
        texts = enumerate_context_texts(table)
        _, whole = loss.context_prefix_log_probs(*context_emissions(table, labels), lengths)
    for k in range(4):
        assert whole[k].item() == pytest.approx(math.log(texts[tuple(labels[0, :k].tolist())]))


def alignment(topology, emit, blank, labels, lengths=None):
    if topology == "merge":
        return loss.merge_prefix_log_probs(emit, blank[..., 0], labels, lengths)
    return loss.context_prefix_log_probs(emit, blank, lengths)


@pytest.mark.parametrize("topology", ["merge", "context"])
@pytest.mark.parametrize("label", [[0, 1, 2], [1, 1, 1], [2, 2, 0]])
def test_prefix_gradients(topology, label):
    labels = torch.tensor([label])
    emit = (torch.randn(1, 5, 3, dtype=torch.float64) - 1).requires_grad_()
    blank = (torch.randn(1, 5, 4, dtype=torch.float64) - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, b: alignment(topology, e, b, labels), (emit, blank))
    objective = lambda e, b: loss.prefix_objective(alignment(topology, e, b, labels)[0], 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(objective, (emit, blank))


@pytest.mark.parametrize("topology", ["merge", "context"])
def test_gradients_are_finite_where_probabilities_are_zero(topology):
    labels = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 2, 0, 1]])  # five labels, three slots
    emit = torch.randn(2, 3, 5, dtype=torch.float64) - 1
    emit[1, :, 1] = -math.inf  # and one label that no slot emits
    blank = torch.randn(2, 3, 6, dtype=torch.float64) - 1
    blank[1, 1] = -math.inf
    emit.requires_grad_(), blank.requires_grad_()
    prefix, whole = alignment(topology, emit, blank, labels)
    assert whole.tolist() == [-math.inf] * 2 and prefix[1, 1] == -math.inf and prefix[0, 0].isfinite()
    (loss.prefix_objective(prefix, 0.8).sum() + prefix[0, 0] + whole.sum()).backward()
    assert emit.grad.isfinite().all() and blank.grad.isfinite().all()
    assert emit.grad[0].abs().sum() > 0


@pytest.mark.parametrize("topology", ["merge", "context"])
def test_objective_gradient_of_label_longer_than_slots(topology):
    labels = torch.tensor([[0, 0, 1, 2, 2]])
    emit = (torch.randn(1, 3, 5, dtype=torch.float64) - 1).requires_grad_()
    blank = (torch.randn(1, 3, 6, dtype=torch.float64) - 1).requires_grad_()
    objective = lambda e, b: loss.prefix_objective(alignment(topology, e, b, labels)[0], 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(objective, (emit, blank))


def test_prefix_objective_by_hand():
    prefix = torch.log(torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.9, 0.0], [0.3, 0.2, 0.1]], dtype=torch.float64))
    got = loss.prefix_objective(prefix, 0.5, torch.tensor([2, 3, 0]))
    first = -(math.log(0.5) + 0.5 * math.log(0.4 / 0.5)) / 1.5
    second = -(math.log(0.9) + 0.5 * 0.0) / 1.5  # the impossible third label neither costs nor counts
    torch.testing.assert_close(got, torch.tensor([first, second, 0.0], dtype=torch.float64))
    unweighted = loss.prefix_objective(prefix[:1], 1.0)
    torch.testing.assert_close(unweighted, -prefix[:1, 2] / 3)
    with pytest.raises(ValueError, match="decay"):
        loss.prefix_objective(prefix, 0.0)


@pytest.mark.parametrize("reach", [0.0, 0.5, 1.0])
def test_each_label_weighs_what_reaches_it(reach):
    conditional = torch.tensor([[0.5, 0.8, 0.25], [0.9, 0.1, 0.7]], dtype=torch.float64).log().requires_grad_()
    before = torch.tensor([[1.0, 0.5, 0.4], [1.0, 0.9, 0.09]], dtype=torch.float64)
    weights = before**reach * torch.tensor([1.0, 0.9, 0.81], dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    got = loss.prefix_objective(conditional.cumsum(1), 0.9, reach=reach)
    torch.testing.assert_close(got, -(weights * conditional).sum(1))
    got.sum().backward()
    torch.testing.assert_close(conditional.grad, -weights)  # no gradient through the weights
    with pytest.raises(ValueError, match="reach"):
        loss.prefix_objective(conditional.cumsum(1), 0.9, reach=-1.0)


def test_reach_goes_on_behind_impossible_labels():
    prefix = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    got = loss.prefix_objective(prefix, 1.0, reach=0.5)
    torch.testing.assert_close(got, torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    got.sum().backward()
    assert prefix.grad.isfinite().all()


def test_labels_beyond_lengths_have_no_gradient():
    emit = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    prefix, _ = loss.merge_prefix_log_probs(emit, torch.randn(1, 4, dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    loss.prefix_objective(prefix, 0.9, torch.tensor([2])).sum().backward()
    assert emit.grad[..., 2].abs().sum() == 0 and emit.grad[..., 1].abs().sum() > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 20), st.floats(-1e4, 1e4))
def test_context_log_normalizers_match_the_full_tensor(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    slot = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * scale + shift
    context = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64) * scale
    context[0, 0, :5] = -math.inf
    got = loss.context_log_normalizers(slot, context)
    torch.testing.assert_close(got, (slot.unsqueeze(2) + context.unsqueeze(1)).logsumexp(-1))


def test_context_log_normalizers_gradient_and_dtype():
    slot = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss.context_log_normalizers, (slot, context))
    assert loss.context_log_normalizers(slot.bfloat16(), context.bfloat16()).dtype == torch.float32


def test_context_log_normalizers_stay_finite_when_everything_underflows():
    slot = torch.tensor([[[0.0, -500.0]]], requires_grad=True)
    context = torch.tensor([[[-500.0, 0.0]]])
    got = loss.context_log_normalizers(slot, context)
    got.sum().backward()
    assert -100 < got.item() < 0 and slot.grad.isfinite().all()
    nothing = loss.context_log_normalizers(torch.full((1, 1, 2), -math.inf), context)
    assert -600 < nothing.item() < 0
