"""Weights of the target in eight bits, by torchao: an option. The text is then that of the quantized target."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..errors import UserError

KINDS = ("int8",)


def quantize(model: Any, kind: str) -> None:
    """Replace the weights of the model's linear layers in place, the LM head's excepted, which drafters read.

    int8: one scale for each output, products in the model's own dtype. Raises UserError without torchao.
    """
    if kind not in KINDS:
        raise UserError(f"Weights cannot be quantized to '{kind}'; known is {', '.join(KINDS)}.")
    said = logging.root.level
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f"Quantized weights need torchao, which cannot be imported ({error}); "
            "run: pip install 'ctc-drafter[quantize]'"
        ) from None
    finally:
        logging.root.setLevel(said)
    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, name: type(module) is nn.Linear and module is not head,
    )
