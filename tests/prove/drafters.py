"""Drafters of every kind for a family, and some that are bad on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ctc_drafter.drafters import DRAFTERS, Drafter, load_drafter
from ctc_drafter.drafters.hybrid import HybridDrafter
from helpers import BUILDS, Scripted

from .family import Case, Family

ATTENTION = {"heads": 4, "kv_heads": 2}
CTC: dict[str, Any] = {**ATTENTION, "slots": 6, "labels": 5, "context_rank": 8}
FEW: dict[str, Any] = {"vocabulary": 24}
REPEATED = 7
"""Place among the kept tokens of the one that "repeats" drafts."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ctc": ("ctc", CTC),
    "ctc, two layers": ("ctc", {**CTC, "layers": 2, "feature_layers": [1, -1]}),
    "ctc, merged": ("ctc", {**CTC, "topology": "merge"}),
    "ctc, paths": ("ctc", {**CTC, "topology": "merge", "tree": "paths"}),
    "ctc, slots": ("ctc", {"slots": 5, "labels": 4, "topology": "merge", "tree": "slots", "module": "heads"}),
    "parallel": ("parallel", ATTENTION),
    "parallel, context": ("parallel", {**ATTENTION, "label_context": True, "context_rank": 8}),
    "medusa": ("medusa", {}),
    "hydra": ("hydra", {"steps": 4}),
    "eagle": ("eagle", {**ATTENTION, "steps": 4}),
    "eagle, CTC": ("eagle", {**ATTENTION, "steps": 3, "ctc_weight": 0.1}),
    "ctc, few tokens": ("ctc", {**CTC, **FEW}),
    "parallel, few tokens": ("parallel", {**ATTENTION, **FEW}),
    "medusa, few tokens": ("medusa", FEW),
    "hydra, few tokens": ("hydra", {**FEW, "steps": 4}),
    "eagle, few tokens": ("eagle", {**ATTENTION, **FEW, "steps": 4}),
    "ctc, other tokens": ("ctc", {**CTC, **FEW}),
    "hydra, other tokens": ("hydra", {**FEW, "steps": 4}),
    "eagle, other tokens": ("eagle", {**ATTENTION, **FEW, "steps": 4}),
    "ctc, all blank": ("ctc", CTC),
    "ctc merged, all blank": ("ctc", {**CTC, "topology": "merge"}),
    "ctc paths, all blank": ("ctc", {**CTC, "topology": "merge", "tree": "paths"}),
    "ctc, repeats": ("ctc", CTC),
    "ctc merged, repeats": ("ctc", {**CTC, "topology": "merge"}),
    "ctc paths, repeats": ("ctc", {**CTC, "topology": "merge", "tree": "paths"}),
    "ctc, NaN": ("ctc", CTC),
    "hydra, NaN": ("hydra", {"steps": 4}),
    "eagle, NaN": ("eagle", {**ATTENTION, "steps": 4}),
}
"""Names and configs. "few tokens" drafts tokens of the answers, "other tokens" none of them."""

WITH_LOOKUP = {"ctc+lookup": "ctc, few tokens", "eagle+lookup": "eagle, few tokens"}
SCRIPTS = {build.__name__: build for build in BUILDS}
NAMES = ["none", "lookup", *KINDS, *WITH_LOOKUP, *SCRIPTS]

Make = Callable[[Case], Drafter | None]


def maker(name: str, family: Family) -> tuple[Drafter, Make]:
    """A drafter for a batch, and the one to hand over with each case (None: a twin of the batch's)."""
    if name in SCRIPTS:
        vocab = family.target.vocab_size
        return load_drafter("none", family.target), lambda c: Scripted(SCRIPTS[name], c.prompt, c.answer, vocab)
    if name in WITH_LOOKUP:
        drafter: Drafter = HybridDrafter(trained(WITH_LOOKUP[name], family))
    else:
        drafter = trained(name, family) if name in KINDS else load_drafter(name, family.target)
    return drafter, lambda case: None


def trained(name: str, family: Family) -> Drafter:
    """A drafter with random weights; what starts at zero or one would hide mistakes."""
    kind, config = KINDS[name]
    torch.manual_seed(1)
    cls: Any = DRAFTERS[kind]
    drafter: Any = cls(cls.config_class(**config), family.target)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
            if name.endswith("NaN"):
                p.fill_(torch.nan)
    said = torch.bincount(torch.tensor([t for case in family.cases for t in case.answer]), minlength=300)
    drafter.fit_vocabulary((said == 0).long() if name.endswith("other tokens") else said)
    drafter.eval().requires_grad_(False).prepare()
    if name.endswith(("all blank", "repeats")):
        assert hasattr(drafter, "slot_logits")  # else the next line would change nothing
        drafter.slot_logits = lambda slots: constant(slots, drafter, -1 if name.endswith("blank") else REPEATED)
    return drafter  # type: ignore[no-any-return]


def constant(slots: torch.Tensor, drafter: Any, place: int) -> torch.Tensor:
    """Slot logits that say the same in every slot and nearly nothing else."""
    logits = slots.new_zeros(*slots.shape[:2], len(drafter.kept) + 1)
    logits[..., place] = 40.0
    return logits
