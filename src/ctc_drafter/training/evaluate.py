"""How good a drafter is on sequences it was not trained on: held-out loss, and tau of real decoding."""

from __future__ import annotations

from typing import Any

import torch

from ..bench.measure import Answer, compare, timed, totals
from ..decoding import generate
from ..drafters import TrainableDrafter
from ..errors import UserError
from ..target import Target
from .config import TrainConfig
from .features import CachedFeatures
from .problems import Problems, Sequence, make_problems, split_problems

LOSS_BATCHES = 4


def problem_loss(
    target: Target, drafter: TrainableDrafter, problems: Problems, cached: CachedFeatures | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The drafter's mean loss on the problems and its metrics; the features are the target's, or `cached`."""
    ids, anchors, labels, possible = (t.to(target.device) for t in problems)
    with torch.no_grad():
        if cached is None:
            _, features = target.forward(ids, use_cache=False, logits_to_keep=1)
        else:
            features = cached.read(problems[0]).to(target.device)
    with torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype != torch.float32):
        return drafter.train_loss(features, ids, anchors, labels, possible)


@torch.no_grad()
def held_out_figures(
    config: TrainConfig,
    target: Target,
    drafter: TrainableDrafter,
    held: list[Sequence],
    cached: CachedFeatures | None = None,
    parts: int = 1,
) -> dict[str, float]:
    """Mean loss (`held_out`) and metrics over LOSS_BATCHES batches spread over the held-out sequences; {} without any.

    `parts`: into how many a batch is split, as in training, whose memory this must not exceed.
    """
    spread = held[:: max(1, len(held) // (LOSS_BATCHES * config.batch))][: LOSS_BATCHES * config.batch]
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for i in range(0, len(spread), config.batch):
        generator = torch.Generator().manual_seed(i)
        problems = make_problems(spread[i : i + config.batch], config.anchors, drafter.proposed_labels, generator)
        for part in split_problems(problems, min(parts, len(problems[0]))):
            loss, metrics = problem_loss(target, drafter, part, cached)
            for key, value in {"held_out": loss, **metrics}.items():
                # Metrics are means over all anchors, the loss over what the drafter says.
                own = key == "held_out"
                weight = drafter.loss_weight(*(t.to(target.device) for t in part[1:])) if own else part[1].numel()
                sums[key] = sums.get(key, 0.0) + weight * float(value)
                weights[key] = weights.get(key, 0.0) + weight
    return {key: value / weights[key] for key, value in sums.items() if weights[key]}


def evaluation_prompts(config: TrainConfig, target: Target, held: list[Sequence]) -> list[list[int]]:
    """Token ids of `evaluate_prompts` held-out prompts, spread over the data. Raises UserError if there are none."""
    prompts = [s.prompt for s in held if 0 < len(s.prompt) < target.max_context]
    wanted = min(config.evaluate_prompts, len(prompts))
    if config.evaluate_prompts and not prompts:
        raise UserError("evaluate_prompts needs held-out sequences and there are none; give more data or held_out.")
    return [prompts[i * len(prompts) // wanted] for i in range(wanted)]


def decoded_tau(
    config: TrainConfig, target: Target, drafter: TrainableDrafter, prompts: list[list[int]]
) -> float | None:
    """Tau of greedy decoding of `prompts` with the drafter as it would be saved; None if no answer takes a step."""
    served = _as_served(target, drafter)
    rows = []
    for ids in prompts:
        answer = Answer()
        options: dict[str, Any] = {"max_new_tokens": config.evaluate_tokens, "budget": config.evaluate_budget}
        for _ in timed(generate(target, served, ids, **options), answer, target):
            pass
        rows.append({"id": 0, "category": "", **compare(target, ids, answer, answer)})  # tau needs no plain run
    tau: float | None = totals(rows)["tau"]
    return tau


def _as_served(target: Target, drafter: TrainableDrafter) -> TrainableDrafter:
    """A copy in the target's dtype, prepared for decoding; training goes on with the original."""
    with torch.random.fork_rng(devices=[]):
        copy: TrainableDrafter = type(drafter)(drafter.config, target)
    copy.load_state_dict(drafter.state_dict())
    copy = copy.to(target.device, target.dtype).eval().requires_grad_(False)
    copy.prepare()
    return copy
