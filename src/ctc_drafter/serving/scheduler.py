"""Continuous scheduling: up to `slots` generations share every pass on one thread that owns the model.

Whoever submits sees events only: one for every step of every job, then an end or an exception.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from ..acceptance import Sampling
from ..batch import Batch
from ..drafters import Drafter
from ..errors import UserError
from ..steps import Step
from ..target import Target
from .worker import Worker

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
    log_probs: int | None = None
    """How many of the most probable tokens to name beside each chosen one; None: tell no probabilities."""


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
    failed: bool
    """Whether that thread has ended by an error."""


class _Run:
    """A job on its way through the scheduler."""

    def __init__(self, job: Job, index: int, submission: Submission) -> None:
        self.job, self.index, self.submission = job, index, submission
        self.cancelled = False
        self.key: int | None = None
        """Of its row in the batch."""


class Submission:
    """Jobs submitted together. Iterate over it for their events, on the event loop that submitted them.

    Raises TimedOut or Failed, after which none of the jobs goes on.
    """

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job], deadline: float) -> None:
        self._scheduler = scheduler
        self.loop = asyncio.get_running_loop()
        """Which reads the events."""
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.deadline = deadline
        """In time.monotonic()."""
        self.runs = [_Run(job, i, self) for i, job in enumerate(jobs)]
        self._open = set(range(len(jobs)))

    def take(self, event: Event | Exception) -> None:
        """Called on the event loop."""
        self._events.put_nowait(event)

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


Told = list[tuple[Submission, Event | Exception]]


def hand_out(told: Told) -> None:
    """Give events to those who wait for them; called by the thread of the model.

    Each event loop is woken once: waking it costs a system call, and then the loop competes for the interpreter.
    """

    def take(mine: Told) -> None:
        for submission, event in mine:
            submission.take(event)

    by_loop: dict[asyncio.AbstractEventLoop, Told] = {}
    for submission, event in told:
        by_loop.setdefault(submission.loop, []).append((submission, event))
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(take, mine)
        except RuntimeError:  # the loop is closed, so nobody reads
            for submission, _ in mine:
                for run in submission.runs:
                    run.cancelled = True


class Scheduler:
    """Runs jobs on one thread; `submit` and `drain` are called on an event loop, `stats` and `close` from anywhere."""

    def __init__(
        self,
        target: Target,
        drafters: Mapping[str, Drafter],
        *,
        budget: int,
        slots: int,
        queue: int,
        timeout: float,
        adaptive: bool = False,
        context: int | None = None,
        memory_limit: int | None = None,
        prefix_cache: int = 0,
        worker: Worker | None = None,
    ) -> None:
        """`drafters` by the names that jobs give; they must read the same layers of the target, or none.

        timeout: of a submission in seconds, waiting included; adaptive: draft only where that is found to be faster,
        see `Batch`, which context, memory_limit and prefix_cache go to; worker: who loaded the model, and who is closed
        with the scheduler (None: one of its own). Raises UserError if a row has no room for a prompt and an answer.
        """
        self.target = target
        widest = max(drafters.values(), key=lambda d: len(d.feature_layers))
        self._batch = Batch(
            target,
            widest,
            rows=slots,
            budget=budget,
            adaptive=adaptive,
            context=context,
            memory_limit=memory_limit,
            prefix_cache=prefix_cache,
        )
        self.context = self._batch.context
        """The most tokens of a prompt and its answer."""
        if self.context < 2:
            raise UserError(
                f"Each of the {slots} slots would hold {self.context} token, and a prompt and its answer take 2 at "
                "least; raise --max-context or the memory limit, or allow fewer slots."
            )
        self.slots, self.queue, self.timeout = slots, queue, timeout
        self._drafters = dict(drafters)
        self._condition = threading.Condition()
        self._waiting: deque[_Run] = deque()
        self._running: deque[_Run] = deque()
        self._draining = self._closed = self._failed = False
        worker = worker or Worker()
        self._ended = worker.do(self._work)
        worker.close()

    # ------------------------------------------------------------ from other threads

    @property
    def drafters(self) -> list[str]:
        """Names that jobs may give."""
        return list(self._drafters)

    def submit(self, jobs: Sequence[Job], since: float | None = None) -> Submission:
        """Queue all jobs or none. Raises Draining, Failed, or Busy if slots and queue have no room for all of them.

        since: the time.monotonic() from which their time limit counts (None: now).
        """
        with self._condition:
            if self._failed:
                raise Failed
            if self._draining or self._closed:
                raise Draining
            if len(self._running) + len(self._waiting) + len(jobs) > self.slots + self.queue:
                raise Busy
            submission = Submission(self, jobs, (time.monotonic() if since is None else since) + self.timeout)
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
            alive = not self._ended.done()
            return Stats(len(self._running), len(self._waiting), self._draining, alive, self._failed)

    def when_ended(self, call: Callable[[], None]) -> None:
        """Let `call` be called, on any thread, when that of the model has ended."""
        self._ended.add_done_callback(lambda _: call())

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
        self._ended.result()

    # ------------------------------------------------------------ on the thread of the model

    def _work(self) -> None:
        try:
            while self._ready():
                self._advance()
        except Exception:  # nobody may wait for a thread that is gone
            log.exception("The thread of the model has ended")
            with self._condition:
                self._failed = self._closed = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            hand_out([(run.submission, Failed()) for run in left])

    def _ready(self) -> bool:
        """Drop what is over, fill free slots, and wait until something runs. False when closed."""
        with self._condition:
            while not self._closed:
                self._drop()
                while self._waiting and len(self._running) < self.slots:
                    self._running.append(self._waiting.popleft())
                if self._running:
                    return True
                self._condition.wait()
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        for run in left:
            self._leave(run)
        hand_out([(run.submission, Draining()) for run in left])
        return False

    def _drop(self) -> None:
        for run in [run for run in self._running if run.cancelled]:
            self._leave(run)
        now = time.monotonic()
        for run in [run for run in [*self._running, *self._waiting] if run.submission.deadline < now]:
            if run in self._waiting:
                self._waiting.remove(run)
            self._leave(run)
            hand_out([(run.submission, TimedOut())])

    def _advance(self) -> None:
        """Make one step of all that run. What fails ends its own submission and no other."""
        told: Told = []
        for run in [run for run in self._running if run.key is None]:
            try:
                self._begin(run)
            except Exception as error:
                told.append(self._count(run, Step.failed(error)))
        run_of = {run.key: run for run in self._running}
        told += [self._count(run_of[key], step) for key, step in self._batch.step()]
        hand_out(told)

    def _begin(self, run: _Run) -> None:
        job = run.job
        run.key = self._batch.add(
            job.prompt_ids,
            max_new_tokens=job.max_new_tokens,
            sampling=job.sampling,
            stop=job.stop,
            drafter=self._drafters[job.drafter].twin(),
            log_probs=job.log_probs,
        )

    def _count(self, run: _Run, step: Step) -> tuple[Submission, Event | Exception]:
        event: Event | Exception = Event(run.index, step, time.monotonic())
        if step.error is not None:
            log.error("A generation failed", exc_info=step.error)
            event = Failed()
        if step.finish is not None:
            self._leave(run)  # before the event goes out: who has the last step finds the slot free
        return run.submission, event

    def _leave(self, run: _Run) -> None:
        if run.key is not None:
            self._batch.cancel(run.key)
            run.key = None
        with self._condition:
            if run in self._running:
                self._running.remove(run)
