"""Several generations at once: rows that begin and end at any step share every pass of the target."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .acceptance import Sampling
from .decoding import Clock, Ending, Loop, Row, Step
from .drafters import Drafter, NoDrafter
from .errors import UserError
from .pace import Pace
from .target import Target

CONTEXT = 4096
"""Positions of a row where nothing else is asked for."""


class RowError(Exception):
    """The prompt of the row with this key could not be read; its cause says why. The other rows are untouched."""

    def __init__(self, key: int) -> None:
        super().__init__(f"The prompt of row {key} could not be read.")
        self.key = key


class Batch:
    """Continuous batching: `add` a prompt at any time, `step` all rows together, `cancel` any of them.

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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """rows: how many run at most; budget: draft nodes of each row in a pass, so `rows * budget` in all.

        context: positions of each row, prompt and answer together (None: the target's, at most 4096); the cache holds
        `rows * (context + budget + 1)` of them at most, and nothing while no row runs. adaptive: draft only, and only
        as much, as `clock` (seconds) shows to be faster at the present number of rows. Raises UserError for sizes below
        1 (budget: 0).
        """
        if rows < 1 or budget < 0 or (context is not None and context < 1):
            raise UserError("A batch needs rows and context of at least 1 and a budget of at least 0.")
        self.target, self.max_rows, self.budget = target, rows, budget
        self.context = min(target.max_context, context or CONTEXT)
        self._loop = self._new_loop()
        self._rows: dict[int, Row] = {}
        self._waiting: dict[int, tuple[Row, list[int]]] = {}
        self._steps: list[tuple[int, Step]] = []
        self._keys = 0
        self._drafter = drafter
        self._idle: list[Drafter] = []
        self._plain = NoDrafter()
        self._pace = Pace(sorted({budget, (budget + 1) // 2, 0}, reverse=True)) if adaptive and budget else None
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
        draft: bool = True,
    ) -> int:
        """Begin a row at the next step; returns its key. `draft=False` decodes it plainly among the others.

        Raises UserError where `generate` does, if no row is free, or if prompt and answer need more than `context`.
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
        self._keys += 1
        drafter = self._plain
        if draft:
            drafter = self._idle.pop() if self._idle else self._drafter.twin()
        self._waiting[self._keys] = Row(self.target, drafter, sampling or Sampling(), ending), list(prompt_ids)
        return self._keys

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Step]]:
        """Advance every running row by one pass, then read the prompts of the added ones: a Step for each row.

        A row is gone with the Step that has a `finish`. Raises RowError if a prompt cannot be read; the steps of the
        others come with the next call. If the shared pass itself fails, all running rows are lost.
        """
        if self._rows:
            self._steps += self._advance()
        while self._waiting:
            key = next(iter(self._waiting))
            row, prompt_ids = self._waiting.pop(key)
            try:
                step = self._loop.join(row, prompt_ids, Clock(self.target.device, False))
            except Exception as error:
                self._release(row)
                raise RowError(key) from error
            self._rows[key] = row
            self._steps.append((key, step))
            self._end(key, step)
        steps, self._steps = self._steps, []
        return steps

    @torch.inference_mode()
    def cancel(self, key: int) -> None:
        """End a row before its next step and free its place; nothing happens if it has ended."""
        if key in self._waiting:
            self._release(self._waiting.pop(key)[0])
        elif key in self._rows:
            self._leave(key)
        self._steps = [(k, step) for k, step in self._steps if k != key]

    # ------------------------------------------------------------

    def _new_loop(self) -> Loop:
        return Loop(self.target, self.context + self.budget + 1, self.max_rows)

    def _advance(self) -> list[tuple[int, Step]]:
        rows = len(self._rows)
        key_of = {row: key for key, row in self._rows.items()}
        keys = [key_of[row] for row in self._loop.rows]
        drafting = any(row.drafter is not self._plain for row in self._rows.values())
        pace = self._pace if drafting else None
        budget = pace.choose(rows) if pace else self.budget * drafting
        began = self._clock()
        try:
            steps = self._loop.step(budget, Clock(self.target.device, False))
        except BaseException:
            for key in list(self._rows):
                self._release(self._rows.pop(key))
            self._loop = self._new_loop()
            raise
        if pace:
            pace.record(rows, budget, sum(len(step.tokens) for step in steps), self._clock() - began)
        out = list(zip(keys, steps))
        for key, step in out:
            self._end(key, step)
        return out

    def _end(self, key: int, step: Step) -> None:
        if step.finish is not None:
            self._leave(key)

    def _leave(self, key: int) -> None:
        row = self._rows.pop(key)
        self._loop.leave(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        """Keep the row's drafter for another one, without what it remembers."""
        if row.drafter is not self._plain:
            row.drafter.start(0)
            row.drafter.serves = None
            self._idle.append(row.drafter)
