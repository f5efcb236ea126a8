"""A program replayed as a CUDA graph: the whole pass is one launch, whatever kernels it is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]
Capture = Callable[[Callable[[], list[torch.Tensor]]], tuple[Callable[[], None], list[torch.Tensor]]]
MAX_GRAPHS = 32
"""Graphs that are kept; a text grows through one for every `STEP` slots, and each cache has its own."""


class Replayed:
    """`run`, recorded once for each shape of its arguments and replayed over buffers that stay where they are.

    The first `changing` arguments are copied into such buffers at every call; the others, the cache's planes, are read
    and written where they are, so a graph serves one cache. Results are valid until the next call but one with the same
    shapes: two sets of buffers take turns, since the loop reads the features of a pass while the next one runs.
    """

    def __init__(self, run: Run, changing: int, capture: Capture | None = None) -> None:
        self._run, self._changing = run, changing
        self._capture = capture or cuda_graph
        self._graphs: OrderedDict[object, tuple[list[torch.Tensor], Callable[[], None], list[torch.Tensor]]]
        self._graphs = OrderedDict()
        self._turn = 0

    def __call__(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        small, planes = arguments[: self._changing], arguments[self._changing :]
        self._turn ^= 1
        shapes = tuple(tuple(a.shape) for a in arguments)
        key = self._turn, shapes, tuple(plane.data_ptr() for plane in planes)
        if key not in self._graphs:
            buffers = [a.clone() for a in small]
            replay, results = self._capture(lambda: self._run([*buffers, *planes]))
            self._graphs[key] = buffers, replay, results
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        buffers, replay, results = self._graphs[key]
        for buffer, a in zip(buffers, small):
            buffer.copy_(a, non_blocking=True)
        replay()
        return results


def cuda_graph(run: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """Record `run` on the current CUDA device: how to replay it, and the tensors in which its results stand then."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # workspaces are allocated before the recording
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results
