"""Copied to `custom_generate/generate.py` of an exported folder, from where `generate` of transformers runs it."""

import sys
from typing import Any

from ctc_drafter.integrations.transformers import generate_from


def generate(model: Any, drafter: str | None = None, budget: int = 8, **arguments: Any) -> Any:
    """The ids that `model.generate(**arguments)` gives, sooner.

    drafter: the exported folder; if None, the value of `custom_generate`; budget: draft nodes scored per step.
    """
    # transformers runs a copy of this file and does not say where it comes from; its caller's variable does.
    folder = drafter or sys._getframe(1).f_locals.get("custom_generate")
    if not isinstance(folder, str):
        raise ValueError("The drafter's folder is not known; pass it as `drafter` too.")
    return generate_from(folder, budget, model, arguments)
