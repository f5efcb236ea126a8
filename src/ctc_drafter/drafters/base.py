"""The Drafter protocol: what the decoding loop and the trainer ask of every drafter."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import from_mapping
from ..errors import UserError
from ..files import WEIGHTS, file_digest, write_folder
from ..jsonl import read_object
from ..target import Target
from ..target.loading import resolve_dtype
from ..tree import DraftTree
from .dtypes import drafting_dtype, stored_dtype
from .shell import build

Registry = dict[str, type["Drafter"]]
DRAFTERS: Registry = {}
IGNORE = -100
"""Label of a position that carries no loss."""


def register(name: str) -> Callable[[type[Drafter]], type[Drafter]]:
    """Class decorator: make a drafter known under `name`."""

    def add(cls: type[Drafter]) -> type[Drafter]:
        cls.kind = name
        DRAFTERS[name] = cls
        return cls

    return add


class Drafter(nn.Module):
    """Proposes draft trees. It never sees the target's future and never decides acceptance.

    A sequence x_0 .. x_t whose features f_0 .. f_t the target has computed comes in as pairs (f_j, x_{j+1}); the last
    next token is the root, which the target has chosen but not yet read.
    """

    kind: ClassVar[str] = ""
    """The name it is registered under, which checkpoints carry."""
    feature_layers: tuple[int, ...] = ()
    """The target's layers whose outputs are its features, in this order; F of them, counted from 1 (-1: the last)."""
    name: str = ""
    """What results call it: the embedded drafter's name, or the folder's."""
    stateless: ClassVar[bool] = False
    """Whether it needs the pairs of the last pass only, and keeps nothing: it is then given no others."""
    serves: object = None
    """The generation whose context the drafter holds."""
    drafts_together: ClassVar[bool] = False
    """Whether there is a `draft_together`; if not, the rows of a batch are drafted for one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lineage = object()
        """The same for all twins, which share their weights."""

    def start(self, capacity: int) -> None:
        """Forget the last sequence; at most `capacity` positions will follow."""

    @property
    def position_bytes(self) -> int:
        """Bytes that one position of the context takes in what `start` makes."""
        other, sizes = self.twin(), []
        for capacity in (64, 128):
            other.start(capacity)
            holders = (other, *other._modules.values())
            held = [value for holder in holders for value in vars(holder).values() if isinstance(value, torch.Tensor)]
            sizes.append(sum(tensor.nbytes for tensor in held))
        return (sizes[1] - sizes[0]) // 64

    def draft(self, features: torch.Tensor, next_tokens: torch.Tensor) -> Any:
        """Run the module on the newly committed pairs: features (1, n, F * hidden_size), next_tokens (1, n)."""
        raise NotImplementedError

    def compile_draft(self) -> float:
        """Compile `draft`, where the drafter can; returns the seconds taken. See `Target.compile`.

        Numbers change by rounding. Twins made before know nothing of it. Raises UserError if it fails.
        """
        return 0.0

    def compile_search(self) -> float:
        """Compile the search of trees, unless that was done on this machine before; returns the seconds taken.

        Worth its two seconds where much is decoded. Without a C++ compiler, or on a GPU, the search stays as it is;
        trees change by rounding. Twins made before know nothing of it.
        """
        return 0.0

    def draft_together(self, twins: Sequence[Self], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
        """What each twin's `draft` returns for its own pairs, up to rounding, in one run of the module.

        twins: of this drafter, each with a sequence of its own; pairs: what each one's `draft` takes.
        """
        raise NotImplementedError

    def tree(self, guess: Any, budget: int) -> DraftTree:
        """Turn what `draft` returned into a draft tree of exactly `budget` nodes (batch 1), or an empty one."""
        raise NotImplementedError

    def trees_together(self, twins: Sequence[Self], guesses: Sequence[Any], budget: int) -> list[DraftTree]:
        """Turn what `draft_together` returned into a tree for each twin, as `tree` does."""
        return [twin.tree(guess, budget) for twin, guess in zip(twins, guesses)]

    def train_loss(
        self,
        features: torch.Tensor,
        token_ids: torch.Tensor,
        anchors: torch.Tensor,
        labels: torch.Tensor,
        possible: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of drafting at many anchors of teacher-forced sequences.

        features (B, T, F * hidden_size); token_ids (B, T); anchors (B, A): position t of each root's predecessor, the
        root being token t+1; labels (B, A, L): the tokens after the root, -100 where there is none; possible (B, T)
        bool: the positions that could be anchors, for drafters that train on all of them.
        Returns the mean loss and named detached metrics.
        """
        raise NotImplementedError

    def twin(self) -> Self:
        """A drafter of the same weights with a sequence of its own, so that each can serve a generation meanwhile.

        What `start` makes must be plain attributes of the drafter or of its direct submodules, and made anew each time:
        these objects are copied, everything below them (layers, parameters, packed weights) is shared.
        """
        other = copy.copy(self)
        other._modules = {name: copy.copy(module) for name, module in self._modules.items()}
        other.serves = None
        return other

    @property
    def num_parameters(self) -> int:
        """Parameters of the drafter's own; the target's embedding and LM head do not count."""
        return sum(p.numel() for p in self.parameters())


class TrainableDrafter(Drafter):
    """A drafter with weights and a dataclass config, stored as `config.json` + `model.safetensors`.

    The target's embedding and LM head are borrowed, never stored. `config.json` follows the speculators convention.
    """

    config_class: ClassVar[type]
    config: Any
    kept: torch.Tensor
    """(K,) ids of the tokens that are drafted, ascending."""
    place: torch.Tensor
    """(V,) for each token its place in `kept`, -1 where it is not drafted."""

    def __init__(self, config: Any, target: Target) -> None:
        super().__init__()
        self.config = config
        self.dtype = target.dtype
        """In which it computes; features and embeddings come in the target's."""
        # A plain list hides the borrowed modules from parameters() and state_dict().
        self._borrowed = [target]
        self.keep_tokens(getattr(config, "vocabulary", 0))

    @property
    def target(self) -> Target:
        return self._borrowed[0]

    def save_pretrained(
        self, folder: str | Path, extra: dict[str, Any] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder atomically, weights in `dtype` (None: their own); `extra` is added to config.json."""
        target = self.target
        config = {
            "architectures": [type(self).__name__],
            "speculators_model_type": self.kind,
            "speculators_config": {
                "algorithm": self.kind,
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.proposed_tokens}],
                "default_proposal_method": "greedy",
                "verifier": {
                    "name_or_path": target.name,
                    "architectures": list(target.model.config.architectures or []),
                    "hidden_size": target.hidden_size,
                    "vocab_size": target.vocab_size,
                    "probe": target.probe(),
                },
            },
            "drafter": dataclasses.asdict(self.config),
            **(extra or {}),
        }
        weights = {
            name: p.detach().to("cpu", stored_dtype(p, dtype)).contiguous() for name, p in self.state_dict().items()
        }

        def write(aside: Path) -> None:
            save_file(weights, aside / WEIGHTS)
            content = {**config, "weights_sha256": file_digest(aside / WEIGHTS)}
            (aside / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

        write_folder(Path(folder), write)

    @property
    def proposed_tokens(self) -> int:
        """The longest continuation that the drafter proposes."""
        raise NotImplementedError

    @property
    def proposed_labels(self) -> int:
        """Labels after the root that training looks at."""
        raise NotImplementedError

    def loss_weight(self, anchors: torch.Tensor, labels: torch.Tensor, possible: torch.Tensor) -> float:
        """Over how many things `train_loss` takes its mean; by it the parts of a batch are weighted.

        Here the anchors whose first label can be drafted; a drafter whose loss is another mean says so.
        """
        first = labels[..., 0]
        return float(((first != IGNORE) & (self.place[first.clamp_min(0)] >= 0)).sum())

    def label_rows(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """labels (B, A, L) -> ids and places among the kept tokens, both (B * A, L), and usable lengths (B * A,).

        A label counts up to the first token that is -100 or cannot be drafted.
        """
        labels = labels.flatten(0, 1)
        valid = labels != IGNORE
        labels = labels.clamp_min(0)
        rows = self.place[labels]
        lengths = (valid & (rows >= 0)).cumprod(-1).sum(-1)
        return labels, rows.clamp_min(0), lengths

    # ------------------------------------------------------------ vocabulary

    def keep_tokens(self, count: int) -> None:
        """Draft only `count` tokens (0: all); which ones, `fit_vocabulary` or a checkpoint says."""
        vocabulary = self.target.vocab_size
        self.register_buffer("kept", torch.arange(min(count or vocabulary, vocabulary)))
        self.register_buffer("place", torch.arange(vocabulary), persistent=False)

    def fit_vocabulary(self, counts: torch.Tensor) -> None:
        """Keep the most frequent tokens; called once before training with the counts (V,) in the training answers."""
        self.kept.copy_(counts.argsort(descending=True, stable=True)[: len(self.kept)].sort().values)
        self._index_kept()

    def _index_kept(self) -> None:
        self.place.fill_(-1)
        self.place[self.kept] = torch.arange(len(self.kept), device=self.kept.device)

    def kept_head(self) -> torch.Tensor:
        """The target's LM head on the kept tokens: (K, hidden_size)."""
        return self.target.head.weight[self.kept].to(self.dtype)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's embedding of tokens (...), (..., hidden_size)."""
        embedded: torch.Tensor = self.target.embedding(tokens).to(self.dtype)
        return embedded

    def check_weights(self) -> None:
        """Raise ValueError if a weight is not finite, or the kept tokens are not ascending tokens of the target."""
        fault = weights_fault(self.state_dict().items(), self.target.vocab_size)
        if fault is not None:
            raise ValueError(fault)

    def prepare(self) -> None:
        """Called once after loading, on the target's device: derive inference-only tables."""
        self._index_kept()


def take_weights(folder: Path, drafter: TrainableDrafter) -> None:
    """Start `drafter` from the weights of a folder of the same kind and shape, whatever target and vocabulary it had.

    Raises UserError if the folder cannot be read or does not fit.
    """
    try:
        kind = read_object(folder / "config.json")["speculators_model_type"]
        weights = load_file(folder / WEIGHTS)
        if kind != drafter.kind:
            raise ValueError(f"it holds a drafter of kind '{kind}', not '{drafter.kind}'")
        drafter.load_state_dict({**weights, "kept": drafter.kept})
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Drafter '{folder}' cannot be trained on from: {reason}") from None


def weights_fault(weights: Iterable[tuple[str, torch.Tensor]], vocabulary: int | None) -> str | None:
    """What is wrong with a drafter's weights, if anything is: numbers that are not finite, or tokens out of order.

    vocabulary: the size of the target's; None if that is not known.
    """
    bad, ordered = [], True
    for name, weight in weights:
        if not bool(weight.float().isfinite().all()):  # eight bits have no isfinite of their own
            bad.append(name)
        if name == "kept":
            ordered = int(weight.min()) >= 0 and not bool((weight[1:] <= weight[:-1]).any())
            ordered = ordered and (vocabulary is None or int(weight.max()) < vocabulary)
    if bad:
        named = ", ".join(bad[:4]) + (" …" if len(bad) > 4 else "")
        return f"{named} {'holds' if len(bad) == 1 else 'hold'} numbers that are not finite"
    return None if ordered else "kept does not name tokens of the target in ascending order"


def read_config(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Class and config of the drafter in a folder, and all that its config.json says; no weight is read.

    Raises UserError if the config is damaged or of an unknown kind.
    """
    path = folder / "config.json"
    content = read_object(
        path, f"Drafter folder '{folder}' has no config.json.", ", so it is not a ctc-drafter checkpoint"
    )
    cls, fields = described(folder, content)
    return cls, from_mapping(cls.config_class, fields, str(path)), content


def described(folder: Path, content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Class and fields of the config that a folder's config.json tells, its verifier checked.

    Raises UserError if `content` is no drafter's or of an unknown kind; whether the fields are right, it does not say.
    """
    try:
        kind, verifier = content["speculators_model_type"], content["speculators_config"]["verifier"]
        fields = dict(content["drafter"])
        cls: Any = DRAFTERS.get(kind)
        if not isinstance(verifier, dict):
            raise TypeError("verifier is not a mapping")
        verifier["probe"] = [float(number) for number in verifier.get("probe") or []]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"'{folder / 'config.json'}' is not a ctc-drafter checkpoint ({reason}).") from None
    if cls is None or not issubclass(cls, TrainableDrafter):
        known = sorted(name for name, c in DRAFTERS.items() if issubclass(c, TrainableDrafter))
        raise UserError(f"'{folder}' holds a drafter of unknown kind '{kind}'; known are {', '.join(known)}.")
    return cls, fields


def load_trainable(folder: Path, target: Target, dtype: str = "auto") -> Drafter:
    """Load a drafter folder for `target`. Raises UserError if it is damaged, unknown or made for another target.

    dtype: in which it computes; auto: see `drafting_dtype`.
    """
    cls, config, content = read_config(folder)
    _check_target(folder, content["speculators_config"]["verifier"], target)
    drafter = build(cls, config, target, folder)
    target.check_layers(drafter.feature_layers)
    with torch.no_grad():
        for p in drafter.parameters():
            p.fill_(torch.nan)  # a weight that is not loaded must show
    try:
        drafter.load_state_dict(load_file(folder / WEIGHTS))
        drafter.check_weights()
        check_digest(folder, content)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / WEIGHTS}' is damaged or does not fit its config: {reason}") from None
    drafter.dtype = drafting_dtype(target) if dtype == "auto" else resolve_dtype(dtype, target.device)
    drafter = drafter.to(target.device, drafter.dtype).eval().requires_grad_(False)
    drafter.prepare()
    return drafter


def check_digest(folder: Path, content: dict[str, Any]) -> str:
    """Raise ValueError if the weights are not those that the config was written with; returns what was found."""
    digest = content.get("weights_sha256")
    if digest is None:
        return "the config has none"
    if digest != file_digest(folder / WEIGHTS):
        raise ValueError("it is not the file that config.json was written with")
    return "the weights are those that the config was written with"


def _check_target(folder: Path, verifier: dict[str, Any], target: Target) -> None:
    made_for = verifier.get("name_or_path")
    for key, mine in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if verifier.get(key) != mine:
            raise UserError(
                f"Drafter '{folder}' was made for target '{made_for}' with {key} {verifier.get(key)}, "
                f"but '{target.name}' has {mine}; train one with `ctc-drafter train --target …`."
            )
    theirs, ours = verifier["probe"], target.probe()
    same = len(theirs) == len(ours) and all(abs(a - b) <= 0.02 * abs(a) + 1e-6 for a, b in zip(theirs, ours))
    if not same:
        raise UserError(
            f"Drafter '{folder}' was made for target '{made_for}', whose weights differ from those of '{target.name}'; "
            "train one with `ctc-drafter train --target …`."
        )
