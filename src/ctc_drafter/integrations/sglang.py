"""Our drafters inside SGLang, as a speculative algorithm of its own, with tree verification.

    CTC_DRAFTER=my-drafter python -m sglang.launch_server --model-path TARGET --page-size 1 \\
        --speculative-algorithm CTC_DRAFTER --speculative-num-draft-tokens 17

(SGLang reads what --speculative-draft-model-path names as a model of transformers, which a drafter is not; so it is
named by an environment variable.)

NOT RUN: SGLang needs a GPU and none was at hand. This module was written against the source of SGLang 0.5.23; what
needs no SGLang (`packed.py`, `chains.py`, and `Drafting` around a stand-in with SGLang's contract) is tested, the rest
is not, and the log says so when it starts.

`register` is an entry point of the group `sglang.srt.plugins`. It registers an algorithm whose worker is SGLang's own
NGRAMWorker with other drafts: that one verifies trees of any shape and samples from the target. The features come from
the hidden states that SGLang can hand out: all rows of a pass (`return_hidden_states_mode="full"`), and those of inner
layers by the way that it has for EAGLE-3.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..drafters import load_drafter
from ..errors import UserError
from ..target import LAST
from .borrowed import borrow_target
from .chains import Pass, TreeDrafter, drafter_layers, ordered_features
from .packed import Draft, packed, prompt_read, verified

log = logging.getLogger("sglang.ctc_drafter")

VERSION = "0.5.23"
"""The release of SGLang whose source this module was written against."""
NAME = "CTC_DRAFTER"
"""Of the algorithm, for --speculative-algorithm."""
VARIABLE = "CTC_DRAFTER"
"""Environment variable with the drafter: a checkpoint folder, or an embedded one by its name."""
DRAFT_TOKENS = 17
"""Root and nodes of a tree, where --speculative-num-draft-tokens does not say."""
UNTRIED = (
    f"ctc-drafter in SGLang is written against {VERSION} and has never run on a GPU; compare its greedy answers with "
    "those of SGLang alone before you rely on it."
)


class Drafting:
    """What turns SGLang's NGRAMWorker into a worker that drafts with one of our drafters; stands before it in the mro.

    Of the worker it uses `draft_token_num` (root and nodes), `_prepare_draft_tokens` (which it replaces) and
    `forward_batch_generation`, whose results it reads. Without overlap scheduling, which `check_arguments` turns off,
    the results of a pass are known before the next one is prepared.
    """

    drafter: TreeDrafter
    layers: tuple[int, ...]
    draft_token_num: int

    if TYPE_CHECKING:
        device: Any

    def set_up(self, drafter: TreeDrafter, layers: tuple[int, ...]) -> None:
        """layers: of the features, in the drafter's order."""
        self.drafter, self.layers = drafter, layers
        self._drafts: dict[str, Draft] = {}
        self._requests: dict[str, Any] = {}

    def _prepare_draft_tokens(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B * size,) and mask (B * size * size,) of the trees to verify."""
        self._used = [self._draft_of(request) for request in batch.reqs]
        return packed(self._used, self.draft_token_num)

    def _draft_of(self, request: Any) -> Draft:
        root = int(request.output_ids[-1])
        draft = self._drafts.get(request.rid)
        # Where the engine has gone on without us there is nothing to verify but the root.
        return draft if draft is not None and draft.root == root else Draft(root, [], [])

    def _update_ngram_corpus(self, batch: Any) -> None:
        """There is no corpus."""

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A pass of the target, then the drafts for the next one."""
        verifies = batch.forward_mode.is_decode()
        reads = not verifies and batch.forward_mode.is_extend()
        ids, starts = (batch.input_ids, batch.prefix_lens) if reads else (None, batch.seq_lens.tolist())
        result = super().forward_batch_generation(batch, *args, **kwargs)  # type: ignore[misc]
        if verifies or reads:
            features = self._features(result.logits_output)
            passes = self._verified(batch, starts, result, features) if verifies else None
            self._draft(self._read(batch, ids, starts, result, features) if passes is None else passes)
        return result

    def _features(self, output: Any) -> torch.Tensor:
        """(T, F * hidden_size): with inner layers SGLang hands out these side by side, and the last one apart."""
        inner = sum(layer != LAST for layer in set(self.layers))
        if not inner:
            return ordered_features(self.layers, output.hidden_states, None)
        last = output.last_hidden_states if LAST in self.layers else output.hidden_states.chunk(inner, -1)[0]
        return ordered_features(self.layers, last, output.hidden_states.chunk(inner, -1))

    def _verified(self, batch: Any, starts: list[int], result: Any, features: torch.Tensor) -> list[Pass]:
        size = self.draft_token_num
        lengths = result.accept_lens.tolist()
        tokens = result.next_token_ids.tolist()  # size of each request, of which the accepted ones count
        passes = []
        for i, (request, draft) in enumerate(zip(batch.reqs, self._used)):
            accepted = tokens[i * size : i * size + lengths[i]]
            self._requests[request.rid] = request
            passes.append(verified(request.rid, starts[i], i * size, draft, accepted, features, size))
        return passes

    def _read(self, batch: Any, ids: Any, starts: list[int], result: Any, features: torch.Tensor) -> list[Pass]:
        sampled = result.next_token_ids.tolist()
        passes, row = [], 0
        for i, (request, count) in enumerate(zip(batch.reqs, batch.extend_lens)):
            whole, end = request.full_untruncated_fill_ids, starts[i] + count
            last = end >= len(whole)
            following = sampled[i] if last else int(whole[end])
            self._requests[request.rid] = request
            longest = self.draft_token_num - 1 if last else 0
            passes.append(
                prompt_read(request.rid, starts[i], row, ids[row : row + count], following, features, longest)
            )
            row += count
        return passes

    def _draft(self, passes: list[Pass]) -> None:
        self._requests = {rid: request for rid, request in self._requests.items() if not request.finished()}
        self._drafts = {rid: draft for rid, draft in self._drafts.items() if rid in self._requests}
        self.drafter.keep_only(self._requests)
        with torch.inference_mode():
            trees = self.drafter.trees(passes)
        for each, tree in zip(passes, trees):
            self._drafts[each.request] = Draft.of(int(each.next_tokens[-1]), tree)


# ---------------------------------------------------------------- setting up


def installed_version() -> str:
    import sglang

    return str(sglang.__version__)


def is_supported(version: str) -> bool:
    """Patch releases of one minor version change the worker's inside, so only the one that was read is taken."""
    return version.split("+")[0].split(".post")[0] == VERSION


def check_version(version: str) -> None:
    """Raise UserError for an SGLang that this module does not know."""
    if not is_supported(version):
        raise UserError(
            f"This ctc-drafter is written for SGLang {VERSION}, and {version} is installed; "
            f"pip install 'sglang=={VERSION}', or look for a newer ctc-drafter."
        )


def check_arguments(args: Any) -> None:
    """Fill in SGLang's arguments (its ServerArgs, or what stands for them), as SGLang does for its NGRAM algorithm.

    Raises UserError for an SGLang of another version and for what was not thought of.
    """
    check_version(installed_version())
    if args.speculative_draft_model_path:
        raise UserError(f"{NAME} takes its drafter from the environment variable {VARIABLE}, not from an option.")
    drafter_layers(drafter_name(), "SGLang")
    for name, least in (("tp_size", "--tp 1"), ("pp_size", "--pp-size 1"), ("dp_size", "--dp 1")):
        if getattr(args, name, 1) != 1:
            raise UserError(f"{NAME} was written for one GPU; start SGLang with {least}.")
    page_size = getattr(args, "page_size", None)
    if page_size not in (None, 1) and getattr(args, "attention_backend", None) != "flashinfer":
        raise UserError(
            f"Trees with --page-size {page_size} need --attention-backend flashinfer; or leave --page-size out."
        )
    args.speculative_num_draft_tokens = args.speculative_num_draft_tokens or DRAFT_TOKENS
    if args.speculative_num_draft_tokens < 2:
        raise UserError("--speculative-num-draft-tokens counts the root too, so it must be at least 2.")
    args.speculative_num_steps = 1
    args.speculative_eagle_topk = args.speculative_num_draft_tokens - 1
    args.disable_overlap_schedule = True
    args.enable_mixed_chunk = False
    args.enable_return_hidden_states = True
    args.return_hidden_states_mode = "full"
    args.max_running_requests = args.max_running_requests or 48


def drafter_name() -> str:
    """Which drafter to use. Raises UserError if the environment does not say."""
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        raise UserError(
            f"SGLang was not told which drafter to use; set the environment variable {VARIABLE} to its folder."
        )
    return name


def hand_out(runner: Any, layers: tuple[int, ...]) -> None:
    """Have SGLang's model runner hand out the outputs of these layers; before its attention and graphs are set up.

    SGLang counts layers from 0, we count them from 1. Raises UserError if the model cannot.
    """
    inner = sorted({layer for layer in layers if layer != LAST})
    if not inner:
        return
    model = runner.model
    if not hasattr(model, "set_eagle3_layers_to_capture"):
        raise UserError(
            f"SGLang's {type(model).__name__} hands out no inner layers; "
            "train a drafter with feature_layers [-1] for it."
        )
    runner.spec_aux_config.eagle_use_aux_hidden_state = True
    runner.spec_aux_config.eagle_aux_hidden_state_layer_ids = [layer - 1 for layer in inner]
    model.logits_processor.keep_last_hidden_states = True


@functools.cache
def worker_class() -> type:
    """The worker. Needs SGLang."""
    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    class CTCWorker(Drafting, NGRAMWorker):  # type: ignore[misc]
        """NGRAMWorker with trees of a drafter."""

        def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
            super().__init__(server_args, gpu_id, nccl_port, target_worker)
            runner, name = self.model_runner, drafter_name()
            layers = drafter_layers(name, "SGLang")
            hand_out(runner, layers)
            longest = runner.model_config.context_len
            target = borrow_target(
                server_args.model_path,
                dtype=runner.dtype,
                device=torch.device(self.device),
                max_context=longest,
                revision=server_args.revision,
                cache_dir=server_args.download_dir,
                trust_remote_code=server_args.trust_remote_code,
            )
            drafter: Any = load_drafter(name, target)
            self.set_up(TreeDrafter(drafter, self.draft_token_num - 1, longest), layers)
            log.warning(UNTRIED)
            log.info("Drafter '%s' (%s) drafts trees of %d nodes.", drafter.name, drafter.kind, self.drafter.budget)

        def clear_cache_pool(self) -> None:
            super().clear_cache_pool()
            self.set_up(TreeDrafter(self.drafter.drafter, self.drafter.budget, self.drafter.max_context), self.layers)

    return CTCWorker


def register() -> None:
    """Called by SGLang in each of its processes; in an SGLang of another version it only says so to who asks for us."""
    try:
        check_version(installed_version())
    except UserError as error:
        if os.environ.get(VARIABLE):
            log.warning("%s The algorithm %s is not there.", error, NAME)
        return
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    class Algorithm(CustomSpecAlgo):  # type: ignore[misc]
        """To SGLang's scheduler it is n-gram drafting, whose inputs and results it shares."""

        def is_ngram(self) -> bool:
            return True

        def has_draft_kv(self) -> bool:
            return False

        def handle_server_args(self, server_args: Any) -> None:
            check_arguments(server_args)

    SpeculativeAlgorithm.register(NAME, supports_overlap=False, spec_class=Algorithm)(lambda args: worker_class())
