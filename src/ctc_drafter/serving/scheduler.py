"""Continuous scheduling: up to `slots` generations take turns on one thread that owns the model, one step each.

Whoever submits sees events only: one for every step of every job, then an end or an exception. A batched engine that
steps all slots in one pass would replace `_next` and `_advance` and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..acceptance import Sampling
from ..decoding import Step, generate
from ..drafters import Drafter
from ..target import Target

log = logging.getLogger(__name__)


class Busy(Exception):
    """All slots run and the queue is full."""


class Draining(Exception):
    """The server finishes what it has and takes nothing new."""


class TimedOut(Exception):
    """The time limit of the request has passed."""


class Failed(Exception):
    """The model could not make a step; the reason is in the server's log."""


@dataclass(frozen=True)
class Job:
    """One generation."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    drafter: str
    """A key of the scheduler's drafters."""


@dataclass(frozen=True)
class Event:
    """One step of the job with this index, made at this time.monotonic()."""

    index: int
    step: Step
    at: float


@dataclass(frozen=True)
class Stats:
    """How many generations run and wait."""

    running: int
    waiting: int
    draining: bool
    alive: bool
    """Whether the thread of the model is there."""


class _Run:
    """A job on its way through the scheduler."""

    def __init__(self, job: Job, index: int, submission: Submission) -> None:
        self.job, self.index, self.submission = job, index, submission
        self.cancelled = False
        self.steps: Iterator[Step] | None = None
        self.drafter: Drafter | None = None


class Submission:
    """Jobs submitted together. Iterate over it for their events, on the event loop that submitted them.

    Raises TimedOut or Failed, after which none of the jobs goes on.
    """

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job], deadline: float) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.deadline = deadline
        """In time.monotonic()."""
        self.runs = [_Run(job, i, self) for i, job in enumerate(jobs)]
        self._open = set(range(len(jobs)))

    def put(self, event: Event | Exception) -> None:
        """Hand an event to the event loop; called by the thread of the model."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, so nobody reads
            for run in self.runs:
                run.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._open:
            event = await self._events.get()
            if isinstance(event, Exception):
                self.cancel()
                raise event
            if event.index not in self._open:
                continue
            if event.step.finish is not None:
                self._open.discard(event.index)
            yield event

    def cancel(self, index: int | None = None) -> None:
        """Free the slot of the job with this index (None: of all) before its next step."""
        chosen = self.runs if index is None else [self.runs[index]]
        self._open -= {run.index for run in chosen}
        self._scheduler.cancel(chosen)


class Scheduler:
    """Runs jobs on one thread; `submit` and `drain` are called on an event loop, `stats` and `close` from anywhere."""

    def __init__(
        self, target: Target, drafters: Mapping[str, Drafter], *, budget: int, slots: int, queue: int, timeout: float
    ) -> None:
        """`drafters` by the names that jobs give; `timeout` of a submission in seconds, waiting included."""
        self.target, self.budget = target, budget
        self.slots, self.queue, self.timeout = slots, queue, timeout
        self._drafters = dict(drafters)
        self._idle: dict[str, list[Drafter]] = {name: [drafter] for name, drafter in drafters.items()}
        self._condition = threading.Condition()
        self._waiting: deque[_Run] = deque()
        self._running: deque[_Run] = deque()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._work, name="ctc-drafter-model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from other threads

    @property
    def drafters(self) -> list[str]:
        """Names that jobs may give."""
        return list(self._drafters)

    def submit(self, jobs: Sequence[Job]) -> Submission:
        """Queue all jobs or none. Raises Draining, or Busy if slots and queue have no room for all of them."""
        with self._condition:
            if self._draining or self._closed:
                raise Draining
            if len(self._running) + len(self._waiting) + len(jobs) > self.slots + self.queue:
                raise Busy
            submission = Submission(self, jobs, time.monotonic() + self.timeout)
            self._waiting += submission.runs
            self._condition.notify()
        return submission

    def cancel(self, runs: Sequence[_Run]) -> None:
        """Called by Submission.cancel: waiting jobs go at once, running ones before their next step."""
        with self._condition:
            for run in runs:
                run.cancelled = True
            self._waiting = deque(run for run in self._waiting if not run.cancelled)
            self._condition.notify()

    def stats(self) -> Stats:
        with self._condition:
            alive = self._thread.is_alive()
            return Stats(len(self._running), len(self._waiting), self._draining, alive)

    async def drain(self) -> None:
        """Take nothing new; returns when all that was taken is done."""
        with self._condition:
            self._draining = True
        while (stats := self.stats()).alive and stats.running + stats.waiting:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Drop everything and end the thread after the step that it is at."""
        with self._condition:
            self._draining = self._closed = True
            self._condition.notify()
        self._thread.join()

    # ------------------------------------------------------------ on the thread of the model

    def _work(self) -> None:
        while (run := self._next()) is not None:
            self._advance(run)

    def _next(self) -> _Run | None:
        """Whose step is next, each in turn; free slots are filled first. None when closed."""
        with self._condition:
            while not self._closed:
                self._drop_late()
                for run in [run for run in self._running if run.cancelled]:
                    self._leave(run)
                while self._waiting and len(self._running) < self.slots:
                    self._running.append(self._waiting.popleft())
                if self._running:
                    self._running.rotate(-1)
                    return self._running[-1]
                self._condition.wait()
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for run in left:
            self._leave(run)
            run.submission.put(Draining())
        return None

    def _drop_late(self) -> None:
        now = time.monotonic()
        late = [run for run in self._waiting if run.submission.deadline < now]
        for run in late:
            self._waiting.remove(run)
            run.submission.put(TimedOut())

    def _advance(self, run: _Run) -> None:
        """Make one step of `run`, or end it. A failure ends this submission and no other."""
        event: Event | Exception
        if time.monotonic() > run.submission.deadline:
            event = TimedOut()
        else:
            try:
                event = Event(run.index, next(self._steps(run)), time.monotonic())
            except Exception:
                log.exception("A generation failed")
                event = Failed()
        if not isinstance(event, Event) or event.step.finish is not None:
            self._leave(run)  # before the event goes out: who has the last step finds the slot free
        run.submission.put(event)

    def _steps(self, run: _Run) -> Iterator[Step]:
        if run.steps is None:
            job = run.job
            idle = self._idle[job.drafter]
            run.drafter = idle.pop() if idle else self._drafters[job.drafter].twin()
            run.steps = generate(
                self.target,
                run.drafter,
                job.prompt_ids,
                max_new_tokens=job.max_new_tokens,
                budget=self.budget,
                sampling=job.sampling,
                stop=job.stop,
            )
        return run.steps

    def _leave(self, run: _Run) -> None:
        close = getattr(run.steps, "close", None)
        if close is not None:
            close()
        run.steps = None
        if run.drafter is not None:
            self._idle[run.job.drafter].append(run.drafter)
            run.drafter = None
        with self._condition:
            if run in self._running:
                self._running.remove(run)
