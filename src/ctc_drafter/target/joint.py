"""The linear layers of compiled passes: those that read the same input as one product, in the fastest way here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from .packing import TYPICAL, prefers_onednn


class Joint:
    """Linear layers that read the same input."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self.sizes = [layer.out_features for layer in layers]

    @cached_property
    def weight(self) -> torch.Tensor:
        """(out of all, in); of a single layer its own."""
        weights = [layer.weight.detach() for layer in self.layers]
        return torch.cat(weights) if len(weights) > 1 else weights[0]


class JointLinears(nn.Module):
    """The products of a compiled pass, all made in one `way`."""

    def __init__(self, joints: Iterable[Joint], way: str) -> None:
        """way: see `fastest_way`; another program for each."""
        super().__init__()
        self._joints = list(joints)
        self.way = way
        self._held: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None] = [None] * len(self._joints)
        self._packed: dict[str, torch.Tensor] = {}
        for i, joint in enumerate(self._joints):
            kept = joint.weight.float().t().contiguous() if way == "transposed" else joint.weight
            self.register_buffer(f"weight_{i}", kept, persistent=False)

    def loaded(self) -> dict[str, torch.Tensor]:
        """The buffers that a program is to read in place of those of the same names: packed ones, if `way` says so.

        A program is exported with plain weights, since packed ones have no strides to trace.
        """
        if self.way == "packed" and not self._packed:
            for name, weight in self.named_buffers():
                self._packed[name] = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL)
        return self._packed

    @contextmanager
    def used(self) -> Iterator[None]:
        """Meanwhile the layers' products are these."""
        layers = [(layer, layer.__dict__.get("forward")) for joint in self._joints for layer in joint.layers]
        for i, joint in enumerate(self._joints):
            for part, layer in enumerate(joint.layers):
                layer.forward = self._forward(i, part)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            self._held = [None] * len(self._joints)
            for layer, forward in layers:
                if forward is None:
                    del layer.__dict__["forward"]
                else:
                    layer.forward = forward  # type: ignore[method-assign]

    def _forward(self, index: int, part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        joint = self._joints[index]
        bias = joint.layers[part].bias

        def forward(x: torch.Tensor) -> torch.Tensor:
            held = self._held[index]
            if held is None or held[0] is not x:
                held = self._held[index] = x, self._product(x, getattr(self, f"weight_{index}")).split(joint.sizes, -1)
            out = held[1][part]
            return (out if bias is None else out + bias).to(x.dtype)

        return forward

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.way == "packed":
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            return out
        if self.way == "transposed":
            return x.float() @ weight
        if self.way == "tiles":
            return x @ weight.t()
        return (x.flatten().float() * weight.float()).sum(-1).view(*x.shape[:-1], -1)


def fastest_way(dtype: torch.dtype, single: bool) -> str:
    """How the products of compiled passes are made on this processor: the fastest way of these.

    Measured by `benchmarks/products.py`; loops by `benchmarks/curves.py --compile`, since only a compiler makes them.

    dtype: of the weights; single: for passes over a single row.

    - `loops`: a single row with weights as they are, (out of all, in), as a sum, of which the compiler makes one loop
      that does nothing but read the weights.
    - `packed`: by oneDNN, of weights packed for all row counts.
    - `tiles`: in bfloat16, weights as they are: nine rows take little longer than one.
    - `transposed`: weights in float32, (in, out of all), so that MKL needs to rearrange nothing, whatever the number of
      rows. A layer in bfloat16 is computed in float32 and rounded at its end, as bfloat16 products are too.
    """
    fastest = "transposed"
    if dtype == torch.bfloat16:
        fastest = "tiles" if has_tiles() else "packed" if multiplies_bfloat16() else "transposed"
    elif dtype == torch.float32 and prefers_onednn(torch.get_num_threads()):
        fastest = "packed"
    return "loops" if single and fastest != "transposed" else fastest


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, and torch makes use of them."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported()) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles (AMX), and torch makes use of it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported()) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def joined_by_input(layers: Iterable[nn.Linear], run: Callable[[], object]) -> list[Joint]:
    """The layers that `run` calls, in groups of those that it calls with the same tensor; no layer twice."""
    groups: dict[int, list[nn.Linear]] = {}
    seen: list[torch.Tensor] = []  # kept, so that no other tensor has the same id

    def note(layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        groups.setdefault(id(inputs[0]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(layer for group in groups.values() for layer in group)
    once = ([layer for layer in group if calls[layer] == 1] for group in groups.values())
    return [Joint(group) for group in once if group]
