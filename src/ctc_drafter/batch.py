"""Several generations at once: rows that begin and end at any step share every pass of the target."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .acceptance import Sampling
from .decoding import Loop, Row
from .drafters import Drafter, NoDrafter
from .ending import Ending
from .errors import UserError
from .memory import row_context
from .pace import Pace
from .steps import Clock, Step
from .target import Target
from .target.prefixes import Prefixes


class Batch:
    """Continuous batching: `add` a prompt at any time, `step` all rows together, `cancel` any of them.

        batch = Batch(target, drafter, rows=8)
        keys = [batch.add(ids) for ids in prompts]
        while len(batch):
            for key, step in batch.step():
                ...

    The steps of a row are those that `generate` yields for its prompt alone, up to rounding: in float32 the tokens are
    equal, those of a row that is sampled with a seed too. Twins of the drafter serve the rows; it may serve others
    meanwhile.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        rows: int = 8,
        budget: int = 8,
        context: int | None = None,
        adaptive: bool = True,
        memory_limit: int | None = None,
        prefix_cache: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """rows: how many run at most; budget: draft nodes of each row in a pass, so at most `rows * budget` in all.

        context: the most positions of a row, prompt and answer together (None: the target's). The cache holds no more
        than `rows * (context + 2 * budget + 1)` of them: as many for each row as the longest one needs, and none while
        no row runs. adaptive: draft as `clock` (seconds) shows to be fastest for the rows that run: nothing, a quarter
        or half of the budget, all of it, or, while half of the rows are free, twice as much, since theirs is left over.
        memory_limit: bytes that keys and values of all rows may take; each row's context is cut to its share.
        prefix_cache: bytes of prompts kept beside them, so that what one begins with is not read again for another; 0
        keeps none. Raises UserError for sizes below 1 (budget, prefix_cache: 0), and if the limit holds no context.
        """
        if rows < 1 or budget < 0 or (context is not None and context < 1):
            raise UserError("A batch needs rows and context of at least 1 and a budget of at least 0.")
        self.target, self.max_rows, self.budget = target, rows, budget
        self.context = min(target.max_context, context or target.max_context)
        if prefix_cache < 0:
            raise UserError(f"prefix_cache must be at least 0 bytes, not {prefix_cache}.")
        self._pace = Pace.up_to(budget, rows) if adaptive and budget else None
        deepest = max(self._pace.budgets) if self._pace else budget
        if memory_limit is not None:
            self.context = min(self.context, row_context(target, drafter, rows, deepest, memory_limit))
        self.prefixes = Prefixes(prefix_cache) if prefix_cache else None
        self._loop = Loop(target, deepest, rows, self.prefixes)
        self._rows: dict[int, Row] = {}
        self._waiting: dict[int, tuple[Row, list[int]]] = {}
        self._keys = 0
        self._drafter = drafter
        self._clock = clock

    @property
    def free(self) -> int:
        """How many prompts may be added now."""
        return self.max_rows - len(self)

    def __len__(self) -> int:
        """Rows that run, those not begun yet included."""
        return len(self._rows) + len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of the key/value cache."""
        return 0 if self._loop.cache is None else self._loop.cache.nbytes

    def add(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        drafter: Drafter | None = None,
        log_probs: int | None = None,
    ) -> int:
        """Add a row, whose prompt is read before the next pass; returns its key.

        drafter: one for this row alone until it ends (None: a twin of the batch's); `NoDrafter()` decodes it plainly.
        log_probs: as of `generate`.
        All drafters of a batch must read the same feature layers, or none. Raises UserError where `generate` does, if
        no row is free, and if prompt and answer need more than `context`.
        """
        ending = Ending.of(self.target, prompt_ids, max_new_tokens, stop)
        if not self.free:
            raise UserError(
                f"All {self.max_rows} rows of the batch are taken; wait for one to end, or allow more rows."
            )
        if len(prompt_ids) + ending.limit > self.context:
            raise UserError(
                f"A prompt of {len(prompt_ids)} tokens and an answer of up to {ending.limit} do not fit into the "
                f"{self.context} positions of a row; shorten them or give the batch a larger context."
            )
        layers = self._drafter.feature_layers
        if drafter is not None and drafter.feature_layers not in ((), layers):
            raise UserError(
                f"Drafter '{drafter.name}' reads the layers {list(drafter.feature_layers)} of the target and the "
                f"batch's reads {list(layers)}; all rows of a batch must read the same."
            )
        self._keys += 1
        mine = self._drafter.twin() if drafter is None else drafter
        row = Row(self.target, mine, sampling or Sampling(), ending, log_probs)
        self._waiting[self._keys] = row, list(prompt_ids)
        return self._keys

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Step]]:
        """Read the prompt of one added row, which is a Step of that row; if none waits, advance all by one pass.

        So a first token is known as soon as its prompt is read, and who joins takes part in the next pass. A row is
        gone with the Step that has a `finish`. What fails is told by a Step with the `error`: a row's own drafter or
        prompt ends that row alone, a failure of the shared pass all that run, of rows that are drafted for together all
        of those. After Ctrl-C during a pass the batch is empty.
        """
        steps: list[tuple[int, Step]] = []
        if self._waiting:
            steps = [self._begin()]
        elif self._rows:
            steps = self._advance()
        for key, step in steps:
            if step.finish is not None:
                self._end(key)
        return steps

    @torch.inference_mode()
    def cancel(self, key: int) -> None:
        """End a row before its next step and free its place; nothing happens if it has ended."""
        if key in self._waiting:
            self._rows[key] = self._waiting.pop(key)[0]
        if key in self._rows:
            self._end(key)

    # ------------------------------------------------------------

    def _begin(self) -> tuple[int, Step]:
        """Read the prompt that has waited longest."""
        key = next(iter(self._waiting))
        row, prompt_ids = self._waiting.pop(key)
        try:
            with self.target.turn:
                step = self._loop.join(row, prompt_ids, Clock(self.target.device, False))
        except Exception as error:
            step = Step.failed(error)
        self._rows[key] = row
        return key, step

    def _advance(self) -> list[tuple[int, Step]]:
        count = len(self._rows)
        drafting = any(type(row.drafter) is not NoDrafter for row in self._rows.values())
        pace = self._pace if drafting else None
        budget = pace.choose(count, self.budget * self.max_rows // count) if pace else self.budget
        try:
            with self.target.turn:
                began = self._clock()  # waiting for the turn is no cost of a budget
                steps = self._loop.step(budget, Clock(self.target.device, False))
        except BaseException as error:
            if isinstance(error, Exception):
                return [(key, Step.failed(error)) for key in self._rows]
            for key in list(self._rows):  # Ctrl-C in the middle of a pass: no row can go on from there
                self._end(key)
            raise
        if pace and len(self._loop.rows) == count:  # else a drafter failed
            pace.learn(budget, [step for _, step in steps], self._clock() - began)
        key_of = {row: key for key, row in self._rows.items()}
        return [(key_of[row], step) for row, step in steps]

    def _end(self, key: int) -> None:
        """Free the row's place; a twin that served it goes with the row."""
        row = self._rows.pop(key)
        self._loop.leave(row)
