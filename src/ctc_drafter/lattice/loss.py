"""Alignment losses: how likely slots are to spell the target's next tokens, summed over every alignment.

Slots i = 1..N each emit a label or a blank. Two topologies turn a slot path into text:

- merge (standard CTC, Graves et al. 2006): equal neighbours merge, then blanks drop;
- context: every non-blank slot emits one label, and its distribution may depend on the last label emitted.

All is in log space, batched over A anchors, differentiable, without NaN gradients where probabilities are 0.
Both recursions also give log P(prefix y_1..y_k), the mass of all paths whose text *starts* with y_1..y_k: a path enters
its k-th label at exactly one slot, so the prefix probability is the sum over slots of first-emission masses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEG_INF = float("-inf")


def ctc_loss(log_probs: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Standard CTC negative log likelihood in nats, (A,), by ``torch.nn.functional.ctc_loss``.

    log_probs: (A, N, V+1), blank last, normalised (its gradient is only right behind log_softmax). labels: (A, L) real
    tokens. lengths: (A,) labels that count, or None for all L. A label that no path spells (it and the blanks between
    its repeats need more than N slots) gets loss 0 and gradient 0 instead of infinity.
    """
    anchors, slots, classes = log_probs.shape
    if lengths is None:
        lengths = labels.new_full((anchors,), labels.shape[1])
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        labels,
        labels.new_full((anchors,), slots),
        lengths,
        blank=classes - 1,
        reduction="none",
        zero_infinity=True,
    )


def label_log_probs(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Emissions of given labels: (A, N, V+1) and (A, L) -> emit (A, N, L) = log p_i(y_j), blank (A, N)."""
    index = labels.unsqueeze(1).expand(-1, log_probs.shape[1], -1)
    return log_probs.gather(2, index), log_probs[..., -1]


def merge_prefix_log_probs(
    emit: Tensor, blank: Tensor, labels: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prefix probabilities in the merge topology.

    emit: (A, N, L) log p_i(y_j); blank: (A, N) log p_i(blank); labels: (A, L); lengths: (A,) labels that count or None.
    Returns log P(prefix y_1..y_k) for k = 1..L, (A, L), and log P(text is exactly the label), (A,); -inf where
    impossible. State j after slot i: last slot emitted y_j (``run``), or a blank since (``rest``); j = 0 is the root.
    """
    anchors, slots, count = emit.shape
    run = emit.new_full((anchors, count + 1), NEG_INF)
    rest = torch.cat([emit.new_zeros(anchors, 1), run[:, 1:]], dim=1)
    # A label equal to its predecessor needs a blank between them, otherwise the two would merge.
    repeated = F.pad(labels[:, 1:] == labels[:, :-1], (1, 0))
    entries = []
    for i in range(slots):
        before = _logaddexp(rest[:, :-1], run[:, :-1].masked_fill(repeated, NEG_INF))
        entry = before + emit[:, i]
        rest = _logaddexp(run, rest) + blank[:, i : i + 1]
        run = torch.cat([run[:, :1], _logaddexp(run[:, 1:] + emit[:, i], entry)], dim=1)
        entries.append(entry)
    return _logsumexp(torch.stack(entries, dim=1), 1), _at_length(_logaddexp(run, rest), lengths)


def context_prefix_log_probs(emit: Tensor, blank: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefix probabilities in the context topology.

    emit: (A, N, L) log p_i(y_j | y_{j-1}); blank: (A, N, L+1) log p_i(blank | y_j), j = 0 being the root; lengths: (A,)
    labels that count, or None. Returns log P(prefix y_1..y_k), (A, L), and log P(text is exactly the label), (A,).
    State j after slot i: y_j is the last label emitted, so the last emitted token is known and the sum stays exact.
    """
    anchors, slots, count = emit.shape
    state = emit.new_full((anchors, count + 1), NEG_INF)
    state[:, 0] = 0.0
    entries = []
    for i in range(slots):
        entry = state[:, :-1] + emit[:, i]
        stay = state + blank[:, i]
        state = torch.cat([stay[:, :1], _logaddexp(stay[:, 1:], entry)], dim=1)
        entries.append(entry)
    return _logsumexp(torch.stack(entries, dim=1), 1), _at_length(state, lengths)


def context_log_normalizers(slot_logits: Tensor, context_logits: Tensor) -> Tensor:
    """log sum_v exp(slot_i(v) + context_j(v)) for every pair: (A, N, C), (A, J, C) -> (A, N, J) float.

    The sum over v factors into one matrix product of exponentials, so no A x N x J x C tensor ever exists. Exact up
    to rounding while the best v of the pair lies within about 70 nats of max_v slot + max_v context in float32 (terms
    87 nats down underflow; 700 in float64); below that the result stays at the floor, not -inf, with gradient 0.
    """
    dtype = torch.promote_types(slot_logits.dtype, torch.float32)
    slot, context = slot_logits.to(dtype), context_logits.to(dtype)
    slot_max = _finite_max(slot)
    context_max = _finite_max(context)
    with torch.autocast(slot.device.type, enabled=False):  # it would round the sum to its own low precision
        total = torch.bmm((slot - slot_max).exp(), (context - context_max).exp().transpose(1, 2))
    return total.clamp_min(torch.finfo(dtype).tiny).log() + slot_max + context_max.transpose(1, 2)


def prefix_objective(
    prefix_log_probs: Tensor, decay: float, lengths: Tensor | None = None, reach: float = 0.0
) -> Tensor:
    """Weighted mean of the conditional surprises -log P(y_k accepted | y_1..y_{k-1} accepted), in nats: (A, L) -> (A,).

    Weight decay^(k-1) * P(y_1..y_{k-1})^reach, whose gradient is not taken. Decay 1 counts all labels alike; below 1
    favours the first, which every accepted run needs. Reach 1 counts a label as often as the labels before it are
    accepted: where the first is hard, all else waits. Labels beyond ``lengths`` (A,) and prefixes of probability 0,
    which no gradient can reach, carry no loss and no weight; an anchor left without labels has loss 0. Raises
    ValueError if decay is not positive or reach is negative.
    """
    if decay <= 0 or reach < 0:
        raise ValueError(f"decay must be positive and reach not negative, got {decay} and {reach}")
    count = prefix_log_probs.shape[1]
    steps = torch.arange(count, device=prefix_log_probs.device)
    valid = prefix_log_probs > NEG_INF
    if lengths is not None:
        valid = valid & (steps < lengths.unsqueeze(1))
    reached = prefix_log_probs.masked_fill(~valid, 0.0)
    before = F.pad(reached[:, :-1], (1, 0))
    conditional = reached - before
    weights = valid * torch.pow(torch.as_tensor(decay, dtype=reached.dtype, device=steps.device), steps)
    weights = weights * (reach * before.detach()).exp()
    tiny = torch.finfo(reached.dtype).tiny
    return -(weights * conditional).sum(1) / weights.sum(1).clamp_min(tiny)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is 0, not NaN, where both are -inf."""
    impossible = torch.maximum(a, b) == NEG_INF
    total = torch.logaddexp(a.masked_fill(impossible, 0.0), b.masked_fill(impossible, 0.0))
    return total.masked_fill(impossible, NEG_INF)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where all are -inf."""
    impossible = (x == NEG_INF).all(dim, keepdim=True)
    return x.masked_fill(impossible, 0.0).logsumexp(dim).masked_fill(impossible.squeeze(dim), NEG_INF)


def _at_length(states: Tensor, lengths: Tensor | None) -> Tensor:
    """(A, L+1) final states -> (A,), the state in which exactly ``lengths`` labels were emitted."""
    return states[:, -1] if lengths is None else states.gather(1, lengths.unsqueeze(1)).squeeze(1)


def _finite_max(x: Tensor) -> Tensor:
    """Maximum over the last axis, kept and detached (it cancels in the result); 0 for a row of -inf."""
    top = x.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == NEG_INF, 0.0)
