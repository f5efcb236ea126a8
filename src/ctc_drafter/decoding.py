"""The loop: draft, score, accept, commit. Plain decoding is this loop with an empty tree; there is no other one.

`generate` runs it for one sequence; `batch.Batch` for several that come and go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .acceptance import Chooser, Sampling, accepted_paths, largest
from .cache import SlotCache
from .errors import UserError
from .logprobs import LogProb, log_probs_of
from .memory import check_fits, spare
from .pace import Pace
from .target import Target
from .target.prefixes import Prefixes
from .tree import DraftTree

if TYPE_CHECKING:
    from .drafters import Drafter

PHASES = ("draft", "tree", "score", "accept", "commit")


@dataclass
class Step:
    """What one pass of the target produced."""

    tokens: list[int]
    """New tokens, the last one not from the draft; cut at a stop."""
    accepted: int
    """Emitted tokens that the draft had guessed."""
    drafted: int
    """Draft nodes scored."""
    seconds: dict[str, float]
    """Time by phase: `prefill` for the first step, else those of PHASES."""
    finish: str | None = None
    """`stop` or `length` on the last step; `error` if a row of a batch could not go on."""
    tree: DraftTree | None = None
    """The draft tree that was scored; None for the first step, which reads the prompt."""
    error: Exception | None = None
    """Why, if `finish` is `error`."""
    log_probs: list[LogProb] | None = None
    """Of each of `tokens`, if they were asked for."""
    nodes: Sequence[int] = ()
    """Of `tree`, those that came true, from the root down; with a stop among `tokens` some may be behind it."""

    @property
    def ranks(self) -> list[int]:
        """The places of `nodes` among all of the tree by falling probability; without probabilities, the nodes."""
        if self.tree is None or self.tree.log_probs is None:
            return list(self.nodes)
        worth = self.tree.log_probs[0].tolist()
        return [sum(p > worth[node] for p in worth) + worth[:node].count(worth[node]) for node in self.nodes]

    def tokens_within(self, budgets: Sequence[int]) -> dict[int, int]:
        """How many `tokens` there would be with only the best so many nodes of the tree, for each of the budgets."""
        # A parent comes before its child and is no less probable, so ranks rise along the path.
        ranks, most = self.ranks, len(self.tokens)
        return {b: min(most, 1 + sum(rank < b for rank in ranks)) for b in budgets}

    @classmethod
    def failed(cls, error: Exception) -> Step:
        """The last step of a row that cannot go on."""
        return cls([], 0, 0, {}, "error", error=error)


class Clock:
    """Seconds between laps; waits for a GPU only when asked to, since waiting costs time itself."""

    def __init__(self, device: torch.device, wait: bool) -> None:
        self._wait = wait and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now


class Row:
    """One sequence among those that are advanced together, and what it carries from pass to pass."""

    def __init__(
        self, target: Target, drafter: Drafter, sampling: Sampling, ending: Ending, log_probs: int | None = None
    ) -> None:
        """log_probs: how many of the most probable tokens to name beside each chosen one (None: tell nothing)."""
        self.drafter, self.ending = drafter, ending
        self._top = log_probs
        self.chooser = Chooser(sampling, target.device)
        self.context: list[int] = []
        """All ids up to the root."""
        self.root = torch.empty(0)
        """(1, 1)."""
        self._unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs of feature and next token that the drafter has not seen: (1, n, F * hidden_size) and (1, n)."""
        self._ticket = object()

    def begin(self, prompt_ids: list[int], features: torch.Tensor, root: torch.Tensor) -> list[int]:
        """The prompt is read: features (1, P, F * hidden_size), the first token chosen (1, 1); returns that token."""
        self.drafter.start(len(prompt_ids) + self.ending.limit)
        self.drafter.serves = self._ticket
        self.root = root
        known = torch.tensor([prompt_ids[1:]], dtype=torch.long, device=root.device)
        self._unseen = [(features, torch.cat([known, root], 1))]
        tokens: list[int] = root[0].tolist()
        self.context = prompt_ids + tokens
        return tokens

    def unseen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand out the pairs that the drafter has not seen. Raises UserError if it serves another sequence by now."""
        if self.drafter.serves is not self._ticket and not self.drafter.stateless:
            raise UserError("Another generation has begun with this drafter; load one drafter for each at a time.")
        pairs, self._unseen = self._unseen, []
        if len(pairs) == 1:
            return pairs[0]
        features, next_tokens = zip(*pairs)
        return torch.cat(features, 1), torch.cat(next_tokens, 1)

    def log_probs(self, logits: torch.Tensor, offsets: list[int], tokens: list[int]) -> list[LogProb] | None:
        """Of tokens chosen at the `offsets` of logits (n, V), if they were asked for."""
        if self._top is None:
            return None
        return log_probs_of(logits[offsets[: len(tokens)]], tokens, self._top)

    def commit(self, features: torch.Tensor, chosen: torch.Tensor, offsets: list[int], tokens: list[int]) -> None:
        """Go on after the accepted path `offsets`: features (1, M+1, F * hidden_size) and chosen tokens (1, M+1)."""
        if not self.drafter.feature_layers:
            features = features[..., :0]  # other rows of the pass may have asked for some
        kept = torch.tensor(offsets, device=chosen.device)
        next_tokens = chosen.index_select(1, kept)
        if self.drafter.stateless:
            self._unseen.clear()
        self._unseen.append((features.index_select(1, kept), next_tokens))
        self.root = next_tokens[:, -1:]
        self.context += tokens


class Loop:
    """The loop over passes of the target, for one row or several: draft, score, accept, commit.

    Rows join and leave between passes. What a row emits does not depend on the others. All drafters must read the same
    feature layers, or none.
    """

    def __init__(self, target: Target, budget: int, max_rows: int = 1, prefixes: Prefixes | None = None) -> None:
        """budget: the most draft nodes of a row that `step` will be asked for; max_rows: the most rows at a time.

        prefixes: where what is read of prompts is kept for others (None: nowhere).
        """
        self.target, self.budget, self.max_rows, self.prefixes = target, budget, max_rows, prefixes
        self.rows: list[Row] = []
        self.cache: SlotCache | None = None
        """None while there are no rows, so that an idle loop holds no memory."""

    def join(self, row: Row, prompt_ids: list[int], clock: Clock, on_read: Callable[[int], None] | None = None) -> Step:
        """Read the prompt of a new row; its first token comes from that. on_read: see `Target.prefill`."""
        target = self.target
        capacity = len(prompt_ids) + row.ending.limit + spare(self.budget)
        if self.cache is None:
            self.cache, place = target.new_cache(capacity), 0
        else:
            place = self.cache.claim(capacity, self.max_rows)
        self.rows.append(row)
        try:
            target.capture(row.drafter.feature_layers)
            known = self.prefixes.find(prompt_ids, target.layers) if self.prefixes is not None else None
            logits, features = target.prefill(prompt_ids, self.cache, place, on_read=on_read, known=known)
            if self.prefixes is not None:
                count = 0 if known is None else len(known.ids)
                self.prefixes.add(prompt_ids, target.layers, self.cache, place, features, count)
            empty = DraftTree.empty(1, target.device)
            root = row.chooser.choose(logits[:, None], empty, empty.ancestor_mask(), prompt_ids)
            tokens = row.begin(prompt_ids, features, root)
        except BaseException:
            self.leave(row)
            raise
        clock.lap("prefill")
        emitted, finish = row.ending.cut(tokens)
        return Step(emitted, 0, 0, clock.seconds, finish, log_probs=row.log_probs(logits, [0], emitted))

    def leave(self, row: Row) -> None:
        """Free the row's place, if it has one; the last row moves into it."""
        if row not in self.rows:
            return
        place = self.rows.index(row)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
        if not self.rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.release(place)

    def step(self, budget: int, clock: Clock) -> list[tuple[Row, Step]]:
        """Advance every row by one pass of the target, with up to `budget` draft nodes each.

        Without a budget nothing is drafted; the drafters catch up when they are asked again. A row whose drafter fails
        leaves, and its Step says so; raises whatever else happens.
        """
        trees, steps = self._draft(budget, clock)
        if not self.rows:
            return steps
        rows, target, cache = self.rows, self.target, self.cache
        assert cache is not None
        tree, budgets = DraftTree.stack(trees), [tree.budget for tree in trees]
        ancestors = tree.ancestor_mask()
        # Another generation may have run since the last pass; a row without a drafter among others needs no features.
        target.capture(max((row.drafter.feature_layers for row in rows), key=len))
        roots = rows[0].root if len(rows) == 1 else torch.cat([row.root for row in rows])
        logits, features = target.score(roots, tree, ancestors, cache)
        clock.lap("score")
        chosen = self._choose(logits, trees, ancestors)
        paths = accepted_paths(tree, chosen, budgets)
        clock.lap("accept")
        cache.keep([offsets for offsets, _ in paths])
        own = zip(features.split(1), chosen.split(1)) if len(rows) > 1 else [(features, chosen)]
        for row, (mine, choices), (offsets, tokens) in zip(rows, own, paths):
            row.commit(mine, choices, offsets, tokens)
        clock.lap("commit")
        for i, (row, scored, (offsets, tokens)) in enumerate(zip(rows, trees, paths)):
            emitted, finish = row.ending.cut(tokens)
            accepted = min(len(emitted), len(tokens) - 1)
            told = row.log_probs(logits[i], offsets, emitted)
            nodes = [offset - 1 for offset in offsets[1:]]
            step = Step(emitted, accepted, scored.budget, clock.seconds, finish, scored, log_probs=told, nodes=nodes)
            steps.append((row, step))
        return steps

    def _draft(self, budget: int, clock: Clock) -> tuple[list[DraftTree], list[tuple[Row, Step]]]:
        """A tree for each row that stays, and the last steps of those whose drafters failed."""
        groups = self._groups() if budget else []
        made: dict[Row, Any] = {}
        for rows in groups:
            made |= _by_row(rows, _guesses)
        clock.lap("draft")
        for rows in groups:
            if not isinstance(made[rows[0]], Exception):
                made |= _by_row(rows, _trees, [made[row] for row in rows], budget)
        if not budget:
            made = {row: DraftTree.empty(1, self.target.device) for row in self.rows}
        clock.lap("tree")
        failed = [(row, Step.failed(error)) for row, error in made.items() if isinstance(error, Exception)]
        for row, _ in failed:
            self.leave(row)
        return [made[row] for row in self.rows], failed

    def _groups(self) -> list[list[Row]]:
        """The rows that are drafted for at once: twins, if they can draft together, else each by itself."""
        groups: defaultdict[object, list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.drafter.lineage if row.drafter.drafts_together else row].append(row)
        return list(groups.values())

    def _choose(self, logits: torch.Tensor, trees: list[DraftTree], ancestors: torch.Tensor) -> torch.Tensor:
        """The tokens that each row chooses after its root and its nodes: logits (B, M+1, V) -> (B, M+1)."""
        rows = self.rows
        if len(rows) == 1:
            return rows[0].chooser.choose(logits, trees[0], ancestors, rows[0].context)
        chosen = largest(logits)
        for i, (row, tree) in enumerate(zip(rows, trees)):
            if not row.chooser.is_argmax:
                size = tree.budget + 1
                own = logits[i : i + 1, :size], tree, ancestors[i : i + 1, :size, :size]
                chosen[i : i + 1, :size] = row.chooser.choose(*own, row.context)
        return chosen


def _guesses(rows: list[Row]) -> list[Any]:
    pairs = [row.unseen() for row in rows]
    if len(rows) == 1:
        return [rows[0].drafter.draft(*pairs[0])]
    return rows[0].drafter.draft_together([row.drafter for row in rows], pairs)


def _trees(rows: list[Row], guesses: list[Any], budget: int) -> list[DraftTree]:
    if len(rows) == 1:
        return [rows[0].drafter.tree(guesses[0], budget)]
    return rows[0].drafter.trees_together([row.drafter for row in rows], guesses, budget)


def _by_row(rows: list[Row], work: Callable[..., list[Any]], *arguments: Any) -> dict[Row, Any]:
    """What work(rows, *arguments) returns for each row, or the exception that it raises for all of them."""
    try:
        return dict(zip(rows, work(rows, *arguments), strict=True))
    except Exception as error:
        return dict.fromkeys(rows, error)


@torch.inference_mode()
def generate(
    target: Target,
    drafter: Drafter,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 128,
    budget: int = 8,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    profile: bool = False,
    on_read: Callable[[int], None] | None = None,
    memory_limit: int | None = None,
    log_probs: int | None = None,
    pace: Pace | None = None,
) -> Iterator[Step]:
    """Generate tokens after `prompt_ids`, one Step per pass of the target.

    Ends at one of the target's stop ids (emitted), after a `stop` string, after `max_new_tokens`, or at the context's
    edge. Greedy output equals the target's own, sampled output has its distribution, whatever the drafter; with a seed
    the sample is the one that plain decoding draws. `profile` waits for the GPU at each phase, so that the times of the
    phases are true there. `on_read` is told how many tokens of the prompt are read, as they are. `memory_limit`: bytes
    that keys and values may take. With `log_probs` steps tell the target's log probabilities of their tokens, and so
    many of the most probable ones. With a `pace`, made for this budget and kept from call to call, each pass drafts as
    much as was found to be fastest, or nothing. Raises UserError for an empty or too long prompt, and one that may not
    fit.
    """
    ending = Ending.of(target, prompt_ids, max_new_tokens, stop)
    if budget < 0:
        raise UserError(f"budget must be at least 0, not {budget}.")
    check_fits(target, drafter, len(prompt_ids), ending.limit, budget, memory_limit)
    row = Row(target, drafter, sampling or Sampling(), ending, log_probs)
    loop = Loop(target, budget)
    with target.turn:
        step = loop.join(row, prompt_ids, Clock(target.device, profile), on_read)
    yield step
    while step.finish is None:
        chosen = budget if pace is None else pace.choose(1, budget)
        with target.turn:
            [(_, step)] = loop.step(chosen, Clock(target.device, profile))
        if step.error is not None:
            raise step.error
        if pace is not None:
            pace.learn(chosen, [step], sum(step.seconds.values()))
        yield step


class Ending:
    """Cuts new tokens at a stop id, a stop string, or the token limit, and says which."""

    def __init__(self, target: Target, stop: Sequence[str], limit: int) -> None:
        self.limit = limit
        self._target = target
        self._stop = [s for s in stop if s]
        # Readers see no special tokens, so only a stop string that names one is sought in the text that has them.
        self._special = [s for s in self._stop if any(name in s for name in _special_tokens(target.tokenizer))]
        self._tokens: list[int] = []
        # A token holds at least one byte, and a stop string may begin inside an earlier token.
        self._window = max((len(s.encode()) for s in self._stop), default=0) + 8

    @classmethod
    def of(cls, target: Target, prompt_ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> Ending:
        """The ending of an answer to this prompt. Raises UserError if it is empty or leaves no room in the context."""
        if not prompt_ids:
            raise UserError("The prompt is empty; give at least one token.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
        room = target.max_context - len(prompt_ids)
        if room <= 0:
            raise UserError(
                f"The prompt has {len(prompt_ids)} tokens and "
                f"the context of '{target.name}' ends at {target.max_context}; shorten it."
            )
        return cls(target, stop, min(max_new_tokens, room))

    def cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """The part of `tokens` that is emitted, and why generation ends there (None: it goes on)."""
        for i, token in enumerate(tokens, 1):
            self._tokens.append(token)
            if token in self._target.stop_ids or self._stopped():
                return tokens[:i], "stop"
            if len(self._tokens) >= self.limit:
                return tokens[:i], "length"
        return tokens, None

    def _stopped(self) -> bool:
        if not self._stop:
            return False
        tail, decode = self._tokens[-self._window :], self._target.tokenizer.decode
        shown = decode(tail, skip_special_tokens=True)
        if any(s in shown for s in self._stop):
            return True
        whole = decode(tail) if self._special else ""
        return any(s in whole for s in self._special)


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
