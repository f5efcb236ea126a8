"""The door to SGLang without SGLang: its trees, and the worker around a stand-in that keeps SGLang's contract.

SGLang itself needs a GPU. What it documents of its verification is written down here once more: positions and links
from the mask, then the walk over them.
"""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ctc_drafter.acceptance import accepted_paths
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import load_drafter
from ctc_drafter.errors import UserError
from ctc_drafter.integrations import sglang
from ctc_drafter.integrations.chains import TreeDrafter, drafter_layers
from ctc_drafter.integrations.packed import Draft, accepted_nodes, packed
from ctc_drafter.integrations.sglang import Drafting
from ctc_drafter.target import EMBEDDED, Target
from ctc_drafter.tree import DraftTree

SIZE = 9
VOCABULARY = 3
QUESTIONS = [
    "Tom has 3 apples and buys 5 more. How many has he?",
    "Give three tips for staying healthy.",
    "Write a function that adds two numbers.",
]


# ---------------------------------------------------------------- what SGLang says that it does


def links_of(mask: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """Depths, first children and next siblings of the nodes of one mask (size, size); -1 where there is none."""
    size = len(mask)
    ancestors = [[j for j in range(i) if mask[i, j]] for i in range(size)]
    parents = [max(found, default=-1) for found in ancestors]
    child = [min((k for k in range(i + 1, size) if mask[k, i]), default=-1) for i in range(size)]
    sibling = [
        min((k for k in range(i + 1, size) if parents[k] == parents[i]), default=-1) if parents[i] >= 0 else -1
        for i in range(size)
    ]
    return [len(found) for found in ancestors], child, sibling


def walk(tokens: list[int], child: list[int], sibling: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    """The accepted nodes, the root first, and the tokens chosen at them."""
    nodes = [0]
    while True:
        here = child[nodes[-1]]
        while here != -1 and tokens[here] != chosen[nodes[-1]]:
            here = sibling[here]
        if here == -1:
            return nodes, [chosen[node] for node in nodes]
        nodes.append(here)


def random_tree(rng: random.Random, budget: int) -> DraftTree:
    """With equal siblings too; padding may stand anywhere."""
    parents = [rng.randint(-1, i - 1) for i in range(budget)]
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    tokens = [rng.randrange(VOCABULARY) for _ in range(budget)]
    return DraftTree(*(torch.tensor([row], dtype=torch.long).reshape(1, budget) for row in (tokens, parents, depths)))


@pytest.mark.parametrize("seed", range(60))
def test_sglang_accepts_what_we_accept(seed: int) -> None:
    rng = random.Random(seed)
    trees = [random_tree(rng, rng.choice([0, 1, 5, SIZE - 1])) for _ in range(3)]
    drafts = [Draft.of(root, tree) for root, tree in enumerate(trees)]
    tokens, mask = packed(drafts, SIZE)
    assert tokens.dtype == np.int64 and mask.dtype == bool
    for i, (draft, tree) in enumerate(zip(drafts, trees)):
        mine, own = tokens.reshape(-1, SIZE)[i].tolist(), mask.reshape(-1, SIZE, SIZE)[i]
        count = tree.budget + 1
        assert mine[:count] == [i, *tree.tokens[0].tolist()]
        assert np.array_equal(own[:count, :count], tree.ancestor_mask()[0].numpy())
        depths, child, sibling = links_of(own)
        assert depths[:count] == tree.offsets()[0].tolist() and set(depths[count:]) <= {1}
        chosen = [rng.randrange(1, VOCABULARY) for _ in range(SIZE)]  # padding guesses 0
        nodes, said = walk(mine, child, sibling, chosen)
        [(want, want_said)] = accepted_paths(tree, torch.tensor([chosen[:count]]))
        assert (nodes, said) == (want, want_said)
        assert accepted_nodes(draft, said, SIZE) == nodes


def test_padding_can_be_accepted_and_large_trees_are_cut() -> None:
    draft = Draft(7, [5], [-1])
    tokens, mask = packed([draft], 4)
    _, child, sibling = links_of(mask.reshape(4, 4))
    nodes, said = walk(tokens.tolist(), child, sibling, [0, 1, 3, 2])
    assert (nodes, said) == ([0, 2], [0, 3])
    assert accepted_nodes(draft, said, 4) == nodes
    long = Draft(7, [1, 2, 3], [-1, 0, 1])
    assert packed([long], 3)[0].tolist() == [7, 1, 2]
    with pytest.raises(ValueError, match="token 3 is no child"):
        accepted_nodes(long, [1, 2, 3, 4], 3)


# ---------------------------------------------------------------- the worker


class Mode:
    def __init__(self, name: str) -> None:
        self.name = name

    def is_decode(self) -> bool:
        return self.name == "decode"

    def is_extend(self) -> bool:
        return self.name in ("extend", "verify")


class StandIn:
    """A worker with the contract of SGLang's NGRAMWorker, over our own target: greedy, one cache for each request.

    Inner layers come side by side in `hidden_states`, and the last one apart, as from SGLang's logits processor.
    """

    def __init__(self, target: Target, layers: tuple[int, ...], size: int) -> None:
        self.target, self.draft_token_num = target, size
        self.inner, self.has_last = sorted(set(layers) - {-1}), -1 in layers
        self.caches: dict[str, Any] = {}

    def run(self, passes: list[torch.Tensor]) -> SimpleNamespace:
        """The output of a pass: passes: features (n, F * hidden_size) of each request, inner layers first."""
        rows, width = torch.cat(passes), self.target.hidden_size
        inner, last = rows[:, : len(self.inner) * width], rows[:, len(self.inner) * width :]
        if not self.inner:
            return SimpleNamespace(hidden_states=last, last_hidden_states=None)
        return SimpleNamespace(hidden_states=inner, last_hidden_states=last)

    def capture(self) -> None:
        self.target.capture((*self.inner, *((-1,) if self.has_last else ())))

    @torch.inference_mode()
    def forward_batch_generation(self, batch: Any) -> SimpleNamespace:
        return self.verify(batch) if batch.forward_mode.is_decode() else self.extend(batch)

    def extend(self, batch: Any) -> SimpleNamespace:
        self.capture()
        passes, sampled, row = [], [], 0
        for request, start, count in zip(batch.reqs, batch.prefix_lens, batch.extend_lens):
            if request.rid not in self.caches:
                self.caches[request.rid] = self.target.new_cache(200)
            assert self.caches[request.rid].length == start
            logits, features = self.target.prefill(
                batch.input_ids[row : row + count].tolist(), self.caches[request.rid]
            )
            passes.append(features[0])
            sampled.append(int(logits.argmax()))
            row += count
        return SimpleNamespace(logits_output=self.run(passes), next_token_ids=torch.tensor(sampled))

    def verify(self, batch: Any) -> SimpleNamespace:
        size = self.draft_token_num
        tokens, mask = self._prepare_draft_tokens(batch)  # type: ignore[attr-defined]
        assert tokens.shape == (len(batch.reqs) * size,) and mask.shape == (len(batch.reqs) * size * size,)
        batch.forward_mode.name = "verify"
        self.capture()
        passes, said, lengths = [], torch.zeros(len(batch.reqs), size, dtype=torch.long), []
        for i, (request, start) in enumerate(zip(batch.reqs, batch.seq_lens.tolist())):
            mine, own = tokens.reshape(-1, size)[i], mask.reshape(-1, size, size)[i]
            depths, child, sibling = links_of(own)
            cache = self.caches[request.rid]
            assert cache.length == start
            ids, offsets = torch.from_numpy(mine)[None], torch.tensor([depths])
            logits, features = self.target._pass(ids, offsets, torch.from_numpy(own)[None], cache)
            nodes, chosen = walk(mine.tolist(), child, sibling, logits[0].argmax(-1).tolist())
            cache.keep([nodes])
            said[i, : len(chosen)] = torch.tensor(chosen)
            lengths.append(len(chosen))
            passes.append(features[0])
        batch.forward_mode.name = "decode"
        return SimpleNamespace(
            logits_output=self.run(passes), next_token_ids=said.flatten(), accept_lens=torch.tensor(lengths)
        )


class Worker(Drafting, StandIn):
    pass


class Request:
    def __init__(self, rid: str, ids: list[int], limit: int, ends: frozenset[int] | set[int] = frozenset()) -> None:
        self.rid, self.ids, self.limit, self.ends = rid, ids, limit, ends
        self.passes = 0
        self.full_untruncated_fill_ids = array("q", ids)
        self.output_ids: list[int] = []
        self.read = 0

    def finished(self) -> bool:
        return len(self.output_ids) >= self.limit or not self.ends.isdisjoint(self.output_ids)


class Engine:
    """Schedules as SGLang does without overlap: extend before decode, results counted before the next pass."""

    def __init__(self, worker: Worker, chunk: int) -> None:
        self.worker, self.chunk = worker, chunk

    def extend(self, requests: list[Request]) -> None:
        counts = [min(self.chunk, len(request.ids) - request.read) for request in requests]
        parts = [torch.tensor(request.ids[request.read : request.read + n]) for request, n in zip(requests, counts)]
        batch = SimpleNamespace(
            reqs=requests,
            forward_mode=Mode("extend"),
            input_ids=torch.cat(parts),
            prefix_lens=[request.read for request in requests],
            extend_lens=counts,
        )
        result = self.worker.forward_batch_generation(batch)
        for request, count, token in zip(requests, counts, result.next_token_ids.tolist()):
            request.read += count
            if request.read == len(request.ids):
                request.output_ids.append(token)

    def decode(self, requests: list[Request]) -> None:
        lengths = [len(request.ids) + len(request.output_ids) - 1 for request in requests]
        batch = SimpleNamespace(reqs=requests, forward_mode=Mode("decode"), seq_lens=torch.tensor(lengths))
        batch.input_ids = None
        result = self.worker.forward_batch_generation(batch)
        size = self.worker.draft_token_num
        for i, (request, count) in enumerate(zip(requests, result.accept_lens.tolist())):
            request.passes += 1
            request.output_ids += result.next_token_ids.tolist()[i * size : i * size + count]

    def answer(self, requests: list[Request]) -> None:
        """Two requests begin, the others join one by one."""
        waiting = list(requests)
        running: list[Request] = []
        while waiting or running:
            reading, waiting = waiting[: 1 if running else 2], waiting[1 if running else 2 :]
            while reading:
                self.extend(reading)
                running += [request for request in reading if request.output_ids]
                reading = [request for request in reading if not request.output_ids]
            for _ in range(3):
                running = [request for request in running if not request.finished()]
                if running:
                    self.decode(running)


@pytest.mark.parametrize(("size", "chunk"), [(2, 1000), (SIZE, 7), (SIZE, 1000)])
def test_answers_are_the_targets_own_in_as_many_passes_as_ours(size: int, chunk: int) -> None:
    """The trained pair, so that drafts are accepted."""
    target = Target.load(EMBEDDED / "target", dtype="float32", device="cpu")
    drafter: Any = load_drafter("ctc", target)
    layers = drafter.feature_layers
    worker = Worker(target, layers, size)
    worker.set_up(TreeDrafter(drafter, size - 1, target.max_context), layers)
    prompts = [target.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    requests = [Request(str(i), ids, 30, target.stop_ids) for i, ids in enumerate(prompts)]
    Engine(worker, chunk).answer(requests)
    for request in requests:
        steps = list(generate(target, drafter, request.ids, max_new_tokens=30, budget=size - 1))
        want = [token for step in steps for token in step.tokens]
        assert request.output_ids[: len(want)] == want
        assert request.passes == len(steps) - 1 < len(want) - 1
    assert len(worker.drafter) <= 1  # contexts go with their requests


def test_a_request_that_is_not_known_is_verified_without_drafts(target: Target, drafter_folder: Path) -> None:
    drafter: Any = load_drafter(str(drafter_folder), target)
    worker = Worker(target, drafter.feature_layers, SIZE)
    worker.set_up(TreeDrafter(drafter, SIZE - 1, target.max_context), drafter.feature_layers)
    request = Request("new", [5, 6], 9)
    request.output_ids = [7]
    tokens, mask = worker._prepare_draft_tokens(SimpleNamespace(reqs=[request]))
    assert tokens.tolist() == [7] + [0] * (SIZE - 1)
    assert links_of(mask.reshape(SIZE, SIZE))[0] == [0] + [1] * (SIZE - 1)


# ---------------------------------------------------------------- setting up


def arguments(**options: Any) -> SimpleNamespace:
    given = {"speculative_draft_model_path": None, "speculative_num_draft_tokens": None, "max_running_requests": None}
    return SimpleNamespace(**{**given, "tp_size": 1, "pp_size": 1, "dp_size": 1, "page_size": None, **options})


@pytest.fixture
def read_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "installed_version", lambda: sglang.VERSION)
    monkeypatch.setenv(sglang.VARIABLE, "ctc")


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0", "0.5.2"])
def test_another_release_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(UserError, match=rf"written for SGLang 0\.5\.23, and {version} is installed; pip install"):
        sglang.check_version(version)


def test_another_release_starts_without_us(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Every SGLang process calls the entry point, also of a release that has none of what we would import."""
    monkeypatch.setattr(sglang, "installed_version", lambda: "0.4.1")
    monkeypatch.delenv(sglang.VARIABLE, raising=False)
    sglang.register()
    assert not caplog.records
    monkeypatch.setenv(sglang.VARIABLE, "ctc")
    sglang.register()
    assert len(caplog.records) == 1 and "0.4.1 is installed" in caplog.text


def test_arguments_are_filled_in(read_version: None) -> None:
    args = arguments()
    sglang.check_arguments(args)
    assert (args.speculative_num_draft_tokens, args.return_hidden_states_mode) == (sglang.DRAFT_TOKENS, "full")
    assert args.disable_overlap_schedule and not args.enable_mixed_chunk
    assert drafter_layers("ctc", "SGLang") == (-1,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_draft_model_path": "ctc"}, "environment variable CTC_DRAFTER"),
        ({"tp_size": 2}, "--tp 1"),
        ({"page_size": 16, "attention_backend": "fa3"}, "flashinfer"),
        ({"speculative_num_draft_tokens": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused(read_version: None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sglang.check_arguments(arguments(**options))


def test_the_drafter_is_named_by_the_environment(read_version: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sglang.VARIABLE, "nowhere")
    with pytest.raises(UserError, match="no drafter 'nowhere'"):
        sglang.check_arguments(arguments())
    monkeypatch.delenv(sglang.VARIABLE)
    with pytest.raises(UserError, match="not told which drafter"):
        sglang.check_arguments(arguments())


def test_layers_are_counted_as_sglang_counts_them() -> None:
    model = SimpleNamespace(set_eagle3_layers_to_capture=None, logits_processor=SimpleNamespace())
    runner = SimpleNamespace(model=model, spec_aux_config=SimpleNamespace())
    sglang.hand_out(runner, (4, 2, -1))
    assert runner.spec_aux_config.eagle_aux_hidden_state_layer_ids == [1, 3]
    assert model.logits_processor.keep_last_hidden_states
    sglang.hand_out(SimpleNamespace(), (-1,))
    with pytest.raises(UserError, match="hands out no inner layers"):
        sglang.hand_out(SimpleNamespace(model=SimpleNamespace()), (1,))
