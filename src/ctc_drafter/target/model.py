"""The frozen Hugging Face model: load and check it, prefill a prompt, score a draft tree in one pass."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..cache import SlotCache
from ..chat import prompt_ids
from ..errors import UserError
from ..tree import DraftTree
from .attention import NAME as GROUPED_ATTENTION
from .compiled import CompiledPass, compiled_pass
from .joint import Joint, JointLinears, fastest_way, joined_by_input
from .loading import GENERATION, check_folder, resolve_device, resolve_dtype, stop_tokens, target_name
from .masks import ragged_mask, row_mask, windows
from .packing import MAX_BYTES, PATIENCE, PackedLinears
from .prefixes import Prefix
from .quantization import quantize
from .selftest import self_test

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

EMBEDDED = Path(__file__).parents[1] / "embedded"
CHUNK = 512
"""Tokens of a prompt that are read in one pass."""
LAST = -1  # feature layer: the decoder's output after the final norm, which the LM head reads


class Target:
    """A causal LM with `prefill` and `score`; passes the tree self-test or refuses to load.

    Features: `capture([2, 4, LAST])` makes both return, beside logits, the outputs of those decoder layers (counted
    from 1) concatenated on the last axis, (1, q, F * hidden_size).

    Threads may decode with one target at once, each with its own twin of a drafter: they take turns, a pass each.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = tokenizer
        self.name = name
        config = self.model.config.get_text_config()
        self.config = config
        self.vocab_size: int = self.model.get_output_embeddings().weight.shape[0]
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_context: int = getattr(config, "max_position_embeddings", None) or 2**20
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # Long factors are chosen by the farthest position of a pass, so a tree would switch to them too early.
            self.max_context = min(self.max_context, rope.get("original_max_position_embeddings", self.max_context))
        self.stop_ids = stop_ids(self.model, tokenizer)
        self._windows = windows(config)
        # transformers 5.24 renamed this argument of its models' forward.
        named = "cache" in inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if named else "past_key_values"
        self.turn = threading.RLock()
        """Held from the choice of features to the last use of what a pass returned, which the next may overwrite."""
        self._packed = PackedLinears(m for m in self.model.modules() if type(m) is nn.Linear)
        self._captured: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._layers: tuple[int, ...] = ()
        self._compiled: dict[tuple[int, tuple[int, ...]], CompiledPass] = {}
        self.num_parameters = sum(p.numel() for p in model.parameters())
        """Of the model, however its weights are kept."""
        self.quantized: str | None = None
        """`int8` or `int4`, if the weights are."""
        self._probe: list[float] | None = None  # of the weights before they were quantized or shared out
        self._joints: list[Joint] | None = None
        self._joint_by_way: dict[str, JointLinears] = {}

    @cached_property
    @torch.inference_mode()
    def position_bytes(self) -> int:
        """Bytes of the keys and values of one position."""
        cache = self.new_cache(1)
        with self.turn:
            self.prefill([0], cache)
        return cache.nbytes

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        """Input embedding (V, hidden_size)."""
        module: nn.Embedding = self.model.get_input_embeddings()
        return module

    @property
    def head(self) -> nn.Linear:
        """LM head, weight (V, hidden_size)."""
        module: nn.Linear = self.model.get_output_embeddings()
        return module

    def probe(self) -> list[float]:
        """`probe_of` the weights as they were loaded, by which a drafter knows its target."""
        return probe_of(self.model) if self._probe is None else self._probe

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        quantized: str | None = None,
    ) -> Target:
        """Load a local folder or hub name (None: the embedded target) and run the self-test.

        dtype: auto, float32, bfloat16 or float16; auto is float32 on a CPU, else the checkpoint's own. quantized:
        `int8` or `int4` keeps the weights in so many bits, by torchao; auto is bfloat16 then. Raises UserError for
        anything that is not a loadable, tree-capable causal LM.
        """
        path = EMBEDDED / "target" if path is None else path
        where = resolve_device(device)
        kind = resolve_dtype("bfloat16" if quantized and dtype == "auto" else dtype, where)
        if Path(path).is_dir():
            check_folder(Path(path))
        elif Path(path).is_absolute() or str(path).startswith((".", "~")) or Path(path).exists():
            raise UserError(f"There is no model folder '{path}'.")
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(path, **options)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=kind, use_safetensors=True, **options
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"'{path}' cannot be loaded as a Hugging Face causal LM: {reason}") from None
        model = model.to(where)
        if quantized is None:
            return cls.of(model, tokenizer, target_name(path))
        probe, count = probe_of(model), sum(p.numel() for p in model.parameters())
        quantize(model, quantized)
        target = cls.of(model, tokenizer, target_name(path))
        target.quantized, target._probe, target.num_parameters = quantized, probe, count
        return target

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str) -> Target:
        """A target around a model that is in memory, where it is and in its dtype; runs the self-test.

        tokenizer: None if neither stop strings nor chats are needed. Raises UserError if the model is not tree-capable.
        """
        config = model.config.get_text_config()
        if (
            config._attn_implementation == "sdpa"
            and getattr(config, "num_key_value_heads", None) != config.num_attention_heads
        ):
            model.set_attn_implementation(GROUPED_ATTENTION)
        target = cls(model, tokenizer, name)
        self_test(target)
        return target

    # ------------------------------------------------------------ features

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose outputs are captured."""
        return self._layers

    def capture(self, layers: Sequence[int]) -> None:
        """Choose the layers whose outputs `prefill` and `score` return as features (empty: none)."""
        if tuple(layers) == self._layers:
            return
        self.check_layers(layers)
        # Some models call the decoder inside their base model directly, so the base model's own hook would stay silent.
        modules = [
            self.model.get_decoder() if i == LAST else _decoder_layers(self.model, self.num_layers)[i - 1]
            for i in layers
        ]
        for hook in self._hooks:
            hook.remove()
        self._layers = tuple(layers)
        self._hooks = [module.register_forward_hook(self._store_output(i)) for i, module in zip(self._layers, modules)]

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise UserError if there is no such feature layer."""
        bad = [i for i in layers if i != LAST and not 1 <= i <= self.num_layers]
        if bad:
            raise UserError(f"Target '{self.name}' has layers 1..{self.num_layers}, so no feature layer {bad[0]}.")

    def _store_output(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._captured[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    # ------------------------------------------------------------ passes

    def forward(self, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, q) -> logits (B, q, V), features (B, q, F * hidden_size); `options` go to the model."""
        logits = self.model(input_ids=ids, **options).logits
        if not self._layers:
            return logits, logits[..., :0]
        parts = [self._captured[i] for i in self._layers]
        self._captured.clear()
        return logits, parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def new_cache(self, capacity: int) -> SlotCache:
        """An empty cache with one row of `capacity` slots; `claim` adds rows."""
        return SlotCache(self.num_layers, capacity)

    def prefill(
        self,
        ids: list[int],
        cache: SlotCache,
        row: int = 0,
        *,
        chunk: int = CHUNK,
        on_read: Callable[[int], None] | None = None,
        known: Prefix | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a prompt into an empty row; last position's logits (1, V), all features (1, P, F * hidden_size).

        In passes of `chunk` tokens, so that activations and mask, (1, 1, chunk, P), grow with P and not with its
        square; on_read is told after each pass how many tokens are read. known: a true beginning of the prompt that was
        read before with the same feature layers, and is not read again. Raises ValueError if chunk is below 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self._packed.prepare(1)
        features, begin = [], 0
        if known is not None:
            cache.fill(row, known.planes)
            features, begin = [known.features], len(known.ids)
        with cache.only(row):
            for start in range(begin, len(ids), chunk):
                tokens = torch.tensor([ids[start : start + chunk]], device=self.device)
                q = tokens.shape[1]
                ancestors = torch.ones(1, q, q, dtype=torch.bool, device=self.device).tril()
                offsets = torch.arange(q, device=self.device)[None]
                logits, part = self._pass(tokens, offsets, ancestors, cache, logits_to_keep=1)
                features.append(part)
                cache.keep([range(q)])
                if on_read is not None:
                    on_read(start + q)
        return logits[:, -1], features[0] if len(features) == 1 else torch.cat(features, 1)

    def score(
        self, root: torch.Tensor, tree: DraftTree, ancestors: torch.Tensor, cache: SlotCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, M+1, V) and features (B, M+1, F * hidden_size) of the roots (B, 1) and every node, in one pass.

        Row b of root and tree goes on where row b of the cache ends. The entries are written behind the rows' lengths;
        `cache.keep` decides which of them stay.
        """
        rows = root.shape[0]
        compiled = self._compiled.get((tree.budget, self._layers)) if rows == 1 else None
        if compiled is not None:
            return compiled(root, tree, ancestors, cache)
        # The row counts of batches come and go with the rows; only one that returns again and again is worth packing.
        self._packed.prepare(rows * (tree.budget + 1), after=1 if rows == 1 else PATIENCE)
        return self._pass(torch.cat([root, tree.tokens], 1), tree.offsets(), ancestors, cache)

    def _pass(
        self, tokens: torch.Tensor, offsets: torch.Tensor, ancestors: torch.Tensor, cache: SlotCache, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        one = len(tokens) == 1
        positions = offsets + (cache.length if one else cache.starts(self.device)[:, None])
        # Nodes past the context's edge can never be emitted; the clamp keeps learned positions in range.
        positions.clamp_(max=self.max_context - 1)

        def mask_of(window: int | None) -> torch.Tensor:
            if one:
                return row_mask(window, positions, ancestors, cache.length, self.dtype)
            return ragged_mask(window, positions, ancestors, cache.starts(self.device), cache.length, self.dtype)

        mask = self.mask_for(mask_of)
        options |= {"position_ids": positions, "attention_mask": mask, self.cache_name: cache, "use_cache": True}
        return self.forward(tokens, **options)

    def mask_for(self, mask_of: Callable[[int | None], torch.Tensor]) -> Any:
        """The mask as the model takes it, from `mask_of` a window: one, or one for each kind of layer."""
        masks = {window: mask_of(window) for window in set(self._windows.values())}
        if len(self._windows) == 1:
            return next(iter(masks.values()))
        return {kind: masks[window] for kind, window in self._windows.items()}

    def compile(self, budget: int, layers: Sequence[int] = (), *, adaptive: bool = False) -> float:
        """Compile the passes of one row over the root alone and over root + `budget` nodes; returns the seconds taken.

        layers: the features that the second returns, those of a drafter; the first returns none. adaptive: also the
        pass over the root alone that returns them, which a drafter needs that may draft nothing. Other passes go on as
        before. Numbers change by rounding. The next process finds the programs on disk, see `programs`.
        Raises UserError if the model cannot be compiled, or there is no C++ compiler.
        """
        if self.quantized and (self.quantized, self.dtype, self.device.type) != ("int8", torch.bfloat16, "cpu"):
            raise UserError(
                f"'{self.name}' is quantized, and can be compiled in int8 and bfloat16 on a CPU only; leave one of the "
                "two out."
            )
        began = time.perf_counter()
        captured = tuple(layers)
        passes = [(0, ()), *([(budget, captured)] if budget else []), *([(0, captured)] if adaptive else [])]
        with self.turn:
            for count, captured in passes:
                if (count, captured) not in self._compiled:
                    self._compiled[count, captured] = compiled_pass(self, count, captured)
        return time.perf_counter() - began

    @torch.inference_mode()
    def joint(self, single: bool) -> JointLinears | None:
        """The products of compiled passes over a single row or several, on a CPU, unless their copies are too large."""
        if self._joints is None:
            layers = [m for m in self.model.modules() if type(m) is nn.Linear and m.weight.dtype == self.dtype]
            small = 4 * sum(m.weight.numel() for m in layers) <= MAX_BYTES
            if self.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16) and small:
                self._joints = joined_by_input(layers, lambda: self.prefill([0], self.new_cache(1)))
            else:
                self._joints = []
        if not self._joints:
            return None
        way = fastest_way(self.dtype, single)
        if way not in self._joint_by_way:
            self._joint_by_way[way] = JointLinears(self._joints, way)
        return self._joint_by_way[way]

    def shard(self, mesh: DeviceMesh) -> None:
        """Share out the decoder layers' weights over the processes of `mesh` (FSDP2), and move the rest to its device.

        Each layer is whole for the time of its own pass only, so from now on all processes make the same passes.
        Embedding, norms outside the layers and LM head, which drafters read, stay whole everywhere.
        """
        from torch.distributed.fsdp import fully_shard

        self._probe = self.probe()
        self._packed = PackedLinears(())  # whose copies would be of whole weights
        layers = _decoder_layers(self.model, self.num_layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        shared = set(layers.parameters())
        decoder = self.model.get_decoder()
        # The root of the layers, so that the next one's weights arrive while this one computes.
        fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if p not in shared})
        self.model.to(mesh.device_type)

    # ------------------------------------------------------------ text

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat with the generation prompt. Raises UserError without a chat template that takes it."""
        return prompt_ids(self.tokenizer, messages)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those of the tokenizer, the model's config and its generation config together.

    Raises UserError if one of the three names something else.
    """
    sources = {"The tokenizer": tokenizer, "config.json": model.config.get_text_config()}
    sources[GENERATION] = getattr(model, "generation_config", None)
    name = getattr(model.config, "name_or_path", None) or type(model).__name__
    return frozenset(
        token
        for what, source in sources.items()
        for token in stop_tokens(getattr(source, "eos_token_id", None), f"{what} of '{name}'")
    )


def _decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        "The target's decoder layers cannot be found, so it has no layer features; use the last layer only."
    )


def probe_of(model: nn.Module) -> list[float]:
    """A few weights spread over a model: enough to tell it from its fine-tuned siblings, in any dtype."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    step = max(1, len(parameters) // 16)
    return [float(v) for p in parameters[::step] for v in p.flatten()[:2].to(torch.bfloat16).float().tolist()]
