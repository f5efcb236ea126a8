"""Tiny models of many families, drafters that behave badly on purpose, and runs that must end."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import TEXTS
from ctc_drafter.decoding import generate
from ctc_drafter.drafters import Drafter
from ctc_drafter.errors import UserError
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from ctc_drafter.training import loop
from ctc_drafter.training.tokenizer import train_tokenizer
from ctc_drafter.tree import ROOT, DraftTree

# ---------------------------------------------------------------- models

VOCAB = 300
CONTEXT = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOW: dict[str, Any] = {"sliding_window": 6}
MIXED: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HEAD: dict[str, Any] = {"head_dim": 8}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

CAPABLE: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {**MIXED, **HEAD},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "falcon": {"alibi": False},
    "gemma": HEAD,
    "gemma2": {**HEAD, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEAD, **MIXED, "query_pre_attn_scalar": 8},
    "glm4": HEAD,
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**HEAD, **MIXED, **EXPERTS},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "llama": {},
    "mistral": WINDOW,
    "mixtral": {**WINDOW, **EXPERTS},
    "olmo2": {},
    "olmo3": MIXED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "stablelm": {},
    "starcoder2": WINDOW,
}
"""Overrides of SIZES for families that can score a tree; a window of 6 is shorter than any test's text."""

INCAPABLE: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"alibi": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 200},
    "llama4_text": {
        **HEAD,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 48,
    },
    "mamba": {"state_size": 4},
    "mamba2": {**HEAD, "num_heads": 8, "state_size": 4, "n_groups": 1},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "recurrent_gemma": {},
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, VOCAB, CONTEXT)


def save_model(folder: Path, kind: str, **overrides: Any) -> Path:
    """Write a random model of family `kind`; biases are random too, so that a lost one would show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- decoding


def plain(target: Target, ids: list[int], tokens: int, **options: Any) -> list[int]:
    """What the model's own greedy `generate` of transformers answers."""
    prompt = torch.tensor([ids])
    out = target.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=sorted(target.stop_ids) or None,
        pad_token_id=0,
        **options,
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def first_with(target: Target, answer: list[int], stops: list[str]) -> int:
    """How many tokens it takes until one of `stops` is in the text; all if none ever is."""
    for n in range(1, len(answer) + 1):
        text = target.tokenizer.decode(answer[:n], skip_special_tokens=True)
        if any(s in text for s in stops if s):
            return n
    return len(answer)


def run(target: Target, drafter: Drafter, ids: list[int], tokens: int, **options: Any) -> tuple[list[int], list[Step]]:
    """All tokens and steps of one generation, with what must hold for every one of them checked."""
    steps = list(generate(target, drafter, ids, max_new_tokens=tokens, **options))
    out = [t for step in steps for t in step.tokens]
    assert all(step.finish is None for step in steps[:-1]) and steps[-1].finish in ("stop", "length")
    assert all(step.tokens and 0 <= step.accepted <= len(step.tokens) for step in steps)
    assert all(step.accepted == len(step.tokens) - 1 for step in steps[1:-1])
    assert len(out) <= tokens
    return out, steps


Build = Callable[["Scripted", int, int], DraftTree]


class Scripted(Drafter):
    """Builds its trees from the known answer; `position` counts the tokens after the prompt that it has been shown."""

    def __init__(self, build: Build, prompt: list[int], answer: list[int], vocab: int) -> None:
        super().__init__()
        self.build, self.prompt, self.answer, self.vocab = build, prompt, answer, vocab
        self.random = random.Random(0)
        self.seen: list[int] = []

    def start(self, capacity: int) -> None:
        self.seen = self.prompt[:1]

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> int:
        self.seen += next_tokens[0].tolist()
        return len(self.seen) - len(self.prompt)

    def tree(self, guess: Any, budget: int) -> DraftTree:
        tree = self.build(self, guess, budget)
        tree.check()
        return tree

    def right(self, position: int, depth: int) -> int:
        """The answer's token `depth` places after the root; 7 past its end."""
        i = position + depth - 1
        return self.answer[i] if i < len(self.answer) else 7

    def wrong(self, position: int, depth: int) -> int:
        return (self.right(position, depth) + 1 + self.random.randrange(self.vocab - 1)) % self.vocab


def pack(tokens: list[int], parents: list[int]) -> DraftTree:
    """One row; depths follow from the parents."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    rows = [torch.tensor([row], dtype=torch.long).reshape(1, len(tokens)) for row in (tokens, parents, depths)]
    return DraftTree(*rows)


def chain(tokens: list[int]) -> DraftTree:
    return pack(tokens, list(range(-1, len(tokens) - 1)))


def always_right(d: Scripted, position: int, budget: int) -> DraftTree:
    return chain([d.right(position, k) for k in range(1, budget + 1)])


def always_wrong(d: Scripted, position: int, budget: int) -> DraftTree:
    return chain([d.wrong(position, k) for k in range(1, budget + 1)])


def right_until_the_last(d: Scripted, position: int, budget: int) -> DraftTree:
    return chain([d.right(position, k) if k < budget else d.wrong(position, k) for k in range(1, budget + 1)])


def random_tree(d: Scripted, position: int, budget: int) -> DraftTree:
    """Any topology; each node right with probability 3/4, so siblings are often equal."""
    parents = [d.random.randrange(-1, i) for i in range(budget)]
    depths = pack([0] * budget, parents).depths[0].tolist()
    tokens = [d.right(position, k) if d.random.random() < 0.75 else d.wrong(position, k) for k in depths]
    return pack(tokens, parents)


def equal_siblings(d: Scripted, position: int, budget: int) -> DraftTree:
    """Every node right, in a random topology: whole branches say the same."""
    parents = [d.random.randrange(max(-1, i - 4), i) for i in range(budget)]
    depths = pack([0] * budget, parents).depths[0].tolist()
    return pack([d.right(position, k) for k in depths], parents)


def one_token_everywhere(d: Scripted, position: int, budget: int) -> DraftTree:
    parents = [d.random.randrange(-1, i) for i in range(budget)]
    return pack([d.right(position, 1)] * budget, parents)


def right_leaf_last(d: Scripted, position: int, budget: int) -> DraftTree:
    """A right path whose nodes lie far apart, behind wrong ones: compaction has to move entries."""
    tokens, parents, path = [], [], ROOT
    for i in range(budget):
        on_path = i % 3 == 2 or i == budget - 1
        depth = 1 + (0 if path == ROOT else int(pack(tokens, parents).depths[0, path]))
        tokens.append(d.right(position, depth) if on_path else d.wrong(position, depth))
        parents.append(path)
        path = i if on_path else path
    return pack(tokens, parents)


def no_nodes(d: Scripted, position: int, budget: int) -> DraftTree:
    return DraftTree.empty(1)


BUILDS: list[Build] = [
    always_right,
    always_wrong,
    right_until_the_last,
    random_tree,
    equal_siblings,
    one_token_everywhere,
    right_leaf_last,
    no_nodes,
]


def joined(steps: list[Step]) -> tuple[list[int], str | None]:
    return [t for step in steps for t in step.tokens], steps[-1].finish


class ScriptedForMany(Drafter):
    """A scripted drafter that finds out by the prompt which answer is told to it."""

    def __init__(self, build: Build, answers: dict[tuple[int, ...], list[int]], vocab: int) -> None:
        super().__init__()
        self.build, self.answers, self.vocab = build, answers, vocab
        self.script: Scripted | None = None

    def start(self, capacity: int) -> None:
        self.script = None

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> int:
        tokens = next_tokens[0].tolist()
        if self.script is None:
            prompt = next(p for p in self.answers if tokens[: len(p) - 1] == list(p[1:]))
            self.script = Scripted(self.build, list(prompt), self.answers[prompt], self.vocab)
            self.script.start(0)
        guess: int = self.script.draft(features, next_tokens)
        return guess

    def tree(self, guess: Any, budget: int) -> DraftTree:
        assert self.script is not None
        return self.script.tree(guess, budget)


# ---------------------------------------------------------------- runs that must end


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Make a call that must be refused; returns its one sentence."""
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class Killed(BaseException):
    """What ends a run without asking it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `train` die in the given step, like a process that is killed: nothing of that step is kept."""
    real = loop.batch_of

    def batch(sequences: Any, at: int, config: Any) -> Any:
        if at == step:
            raise Killed
        return real(sequences, at, config)

    monkeypatch.setattr(loop, "batch_of", batch)
