"""Weights of the target in eight or four bits, by torchao: an option. The text is then that of the quantized target."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UserError

KINDS = ("int8", "int4")
GROUP = 32
"""Inputs that share a scale and a zero in four bits."""


class IntegerLinear(nn.Module):
    """A linear layer with integer weights on a CPU in bfloat16: torch's own product, called without a way around.

    The way through torchao's tensor class takes longer than the product itself on a small model. Each row's result is
    the same however many rows there are.
    """

    def __init__(self, linear: nn.Linear, group: int) -> None:
        """linear: as torchao left it; group: inputs that share a scale (0: all, and eight bits)."""
        super().__init__()
        weight: Any = linear.weight
        self.group, self.out_features, self.bias = group, linear.out_features, linear.bias
        self.register_buffer("packed", weight.qdata)
        self.register_buffer("scales", weight.scale_and_zero if group else weight.scale.flatten().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        product: torch.Tensor
        if self.group:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.scales)
        else:
            product = torch.ops.aten._weight_int8pack_mm(flat, self.packed, self.scales)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def quantize(model: Any, kind: str) -> None:
    """Replace the weights of the model's linear layers in place, the LM head's excepted, which drafters read.

    int8: one scale for each output. int4: a scale and a zero for each GROUP inputs of an output; layers whose inputs do
    not divide into groups keep their weights. Products in the model's own dtype, which must be bfloat16 for int4.
    Raises UserError without torchao, for another kind, and where int4 does not go.
    """
    if kind not in KINDS:
        raise UserError(f"Weights cannot be quantized to '{kind}'; known are {' and '.join(KINDS)}.")
    head = model.get_output_embeddings()
    dtype, device = head.weight.dtype, head.weight.device
    if kind == "int4" and dtype != torch.bfloat16:
        raise UserError("Weights in four bits are multiplied in bfloat16; pass --dtype bfloat16, or leave that out.")

    def chosen(module: nn.Module, name: str = "") -> bool:
        return type(module) is nn.Linear and module is not head and not (kind == "int4" and module.in_features % GROUP)

    layers = [(name, module) for name, module in model.named_modules() if chosen(module)]
    if not layers:
        raise UserError(f"No layer of this model can be quantized to '{kind}'; leave that out.")
    level, disabled = logging.root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao tells of each of its libraries that is not for this machine
    try:
        _quantized(model, kind, device.type, chosen)
    except ImportError as error:
        raise UserError(
            f"Weights in {kind} need torchao 0.18, which cannot be imported ({error}); "
            "run: pip install 'ctc-drafter[quantize]'"
        ) from None
    finally:
        logging.root.setLevel(level)
        logging.disable(disabled)
    if device.type == "cpu" and dtype == torch.bfloat16:
        for name, module in layers:
            model.set_submodule(name, IntegerLinear(module, GROUP if kind == "int4" else 0))


def _quantized(model: Any, kind: str, device: str, chosen: Callable[[nn.Module, str], bool]) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if kind == "int8":
        config: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    elif device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    else:
        packing: Any = "tile_packed_to_4d"
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packing, set_inductor_config=False)
    quantize_(model, config, filter_fn=chosen)
