"""The scheduler by itself: joining, leaving, limits, failures."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any
from unittest.mock import patch

import pytest

from ctc_drafter.acceptance import Sampling
from ctc_drafter.batch import Batch
from ctc_drafter.cli.serving import load_scheduler
from ctc_drafter.drafters import Drafter, LookupDrafter, NoDrafter
from ctc_drafter.serving.scheduler import Busy, Draining, Failed, Job, Scheduler, Submission, TimedOut
from ctc_drafter.serving.server import warm_up
from ctc_drafter.serving.worker import Worker
from ctc_drafter.steps import Step
from ctc_drafter.target import Target
from live import QUESTIONS, BrokenDrafter, PacedDrafter, chat_ids, tokens_of

PACE = 0.02  # seconds of a step


def job(target: Target, question: int = 0, drafter: str = "paced", tokens: int = 30) -> Job:
    return Job(chat_ids(target, QUESTIONS[question]), tokens, Sampling(), (), drafter)


@contextmanager
def scheduler(target: Target, *drafters: Drafter, **options: Any) -> Iterator[Scheduler]:
    named = {d.name: d for d in drafters or (PacedDrafter(PACE),)}
    settings: dict[str, Any] = {"slots": 2, "queue": 2, "timeout": 60.0, **options}
    made = Scheduler(target, named, budget=6, **settings)
    try:
        yield made
    finally:
        made.close()


async def collect(submission: Submission) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    async for event in submission:
        out.setdefault(event.index, []).extend(event.step.tokens)
    return out


def trial(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize("context", [2, 3, 8, 9, 24])
def test_every_context_that_holds_an_answer_is_warmed_up(target: Target, drafter: Drafter, context: int) -> None:
    async def test() -> None:
        await warm_up(made)
        assert await collect(made.submit([Job([5], context - 1, Sampling(), (), drafter.name)]))

    with scheduler(target, drafter.twin(), NoDrafter(), context=context) as made:
        trial(test)


def test_more_jobs_than_slots_all_get_their_own_answers(target: Target, drafter: Drafter) -> None:
    async def test() -> None:
        jobs = [job(target, i, drafter.name) for i in range(6)]
        results = await asyncio.gather(*(collect(made.submit([j])) for j in jobs[:3]), collect(made.submit(jobs[3:])))
        answers = [r[0] for r in results[:3]] + [results[3][i] for i in range(3)]
        assert answers == want
        assert (made.stats().running, made.stats().waiting) == (0, 0)
        gc.collect()
        assert len(twins) <= 2 < born  # what a job remembered is gone with it

    twins: weakref.WeakSet[Drafter] = weakref.WeakSet()
    born, real = 0, Drafter.twin

    def counted(self: Drafter) -> Drafter:
        nonlocal born
        born += 1
        twin = real(self)
        twins.add(twin)
        return twin

    want = [tokens_of(target, drafter, chat_ids(target, QUESTIONS[i]), max_new_tokens=30) for i in range(6)]
    with patch.object(Drafter, "twin", counted), scheduler(target, drafter, slots=2, queue=4) as made:
        trial(test)


def test_turns_are_taken_step_by_step(target: Target) -> None:
    async def test() -> None:
        order = [event.index async for event in made.submit([job(target, i, "none", 10) for i in range(3)])]
        assert order[:3] == [0, 1, 2]
        assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))

    with scheduler(target, NoDrafter(), slots=3) as made:
        trial(test)


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_who_joins_and_leaves(target: Target, drafter: Drafter, seed: int) -> None:
    async def follow(question: int, kind: str, patience: int) -> None:
        await asyncio.sleep(random.uniform(0, 0.2))
        submission = made.submit([job(target, question, kind, tokens=24)])
        got: list[int] = []
        async for event in submission:
            got += event.step.tokens
            if len(got) >= patience:
                submission.cancel()
        assert got == want[question][: len(got)]
        assert len(got) >= min(patience, 24)

    async def test() -> None:
        kinds = [drafter.name, "lookup", "none"]
        await asyncio.gather(
            *(follow(random.randrange(8), random.choice(kinds), random.choice([1, 5, 12, 99])) for _ in range(16))
        )
        await made.drain()  # the last that left may not have been noticed yet
        assert (made.stats().running, made.stats().waiting) == (0, 0)

    random = Random(seed)
    want = [tokens_of(target, NoDrafter(), chat_ids(target, q), max_new_tokens=24) for q in QUESTIONS]
    with scheduler(target, drafter.twin(), LookupDrafter(), NoDrafter(), slots=3, queue=20) as made:
        trial(test)


def test_a_job_that_comes_later_joins_at_the_next_step(target: Target) -> None:
    async def test() -> None:
        first = made.submit([job(target, 0)])
        events = aiter(first)
        for _ in range(5):
            await anext(events)
        second = await collect(made.submit([job(target, 1, tokens=4)]))
        assert len(second[0]) == 4
        seen = 5
        while first._events.qsize():
            await anext(events)
            seen += 1
        assert seen < 15  # the first is far from its 30 tokens
        first.cancel()

    with scheduler(target) as made:
        trial(test)


def test_a_full_queue_takes_all_jobs_or_none(target: Target) -> None:
    async def test() -> None:
        taken = [made.submit([job(target, i)]) for i in range(3)]
        with pytest.raises(Busy):
            made.submit([job(target), job(target)])
        taken.append(made.submit([job(target, 3)]))
        with pytest.raises(Busy):
            made.submit([job(target)])
        taken[3].cancel()  # waits still, so its place is free at once
        taken.append(made.submit([job(target, 4, tokens=3)]))
        taken[0].cancel()
        assert len((await collect(taken[4]))[0]) == 3

    with scheduler(target) as made:
        trial(test)


def test_a_cancelled_job_frees_its_slot_within_a_step(target: Target) -> None:
    async def test() -> None:
        held = made.submit([job(target, 0), job(target, 1)])
        events = aiter(held)
        for _ in range(4):
            await anext(events)
        waiting = made.submit([job(target, 2, tokens=5)])
        began = asyncio.get_running_loop().time()
        held.cancel(0)
        await anext(aiter(waiting))
        assert asyncio.get_running_loop().time() - began < 10 * PACE
        assert {event.index async for event in held} == {1}  # the other goes on to its end

    with scheduler(target) as made:
        trial(test)


def test_the_time_limit_holds_while_running_and_while_waiting(target: Target) -> None:
    async def test() -> None:
        running = made.submit([job(target, 0, tokens=100)])
        waiting = made.submit([job(target, 1)])
        got: list[int] = []
        with pytest.raises(TimedOut):
            async for event in running:
                got += event.step.tokens
        assert 2 < len(got) < 100
        with pytest.raises(TimedOut):
            await collect(waiting)
        assert await collect(made.submit([job(target, 2, tokens=2)]))

    with scheduler(target, slots=1, timeout=0.4) as made:
        trial(test)


def test_a_failure_ends_its_own_submission_only(target: Target) -> None:
    async def test() -> None:
        good = asyncio.ensure_future(collect(made.submit([job(target, 0, "none")])))
        with pytest.raises(Failed):
            await collect(made.submit([job(target, 1, "broken")]))
        assert len((await good)[0]) == 30
        assert (made.stats().running, made.stats().alive) == (0, True)

    with scheduler(target, NoDrafter(), BrokenDrafter()) as made:
        trial(test)


def test_draining_finishes_what_was_taken_and_takes_nothing_new(target: Target) -> None:
    async def test() -> None:
        taken = [asyncio.ensure_future(collect(made.submit([job(target, i, tokens=6)]))) for i in range(4)]
        await asyncio.sleep(0)  # let them submit
        drained = asyncio.ensure_future(made.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            made.submit([job(target)])
        assert [len((await t)[0]) for t in taken] == [6] * 4
        await drained
        assert made.stats().draining

    with scheduler(target) as made:
        trial(test)


def test_closing_ends_what_runs(target: Target) -> None:
    async def test() -> None:
        task = asyncio.ensure_future(collect(made.submit([job(target, 0, tokens=100)])))
        await asyncio.sleep(4 * PACE)
        await asyncio.to_thread(made.close)
        with pytest.raises(Draining):
            await task
        assert not made.stats().alive

    with scheduler(target) as made:
        trial(test)


def test_serve_runs_the_model_on_the_thread_that_loaded_it(target: Target) -> None:
    """OpenMP is slower where two threads have used it."""
    threads: set[int] = set()
    real = Batch.step

    def load() -> Target:
        threads.add(threading.get_ident())
        return target

    def step(self: Batch) -> list[tuple[int, Step]]:
        threads.add(threading.get_ident())
        return real(self)

    async def test() -> None:
        assert await collect(made.submit([job(target, drafter="lookup")]))

    with patch.object(Batch, "step", step):
        made = load_scheduler(load, "lookup", budget=6, slots=2, queue=2, timeout=60.0)
        assert made.drafters == ["lookup", "none"] and made.stats().alive
        trial(test)
        made.close()
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert not made.stats().alive


def test_a_worker_hands_back_what_its_tasks_return_and_raise() -> None:
    def fail() -> None:
        raise ValueError("no")

    worker, done = Worker(), list[int]()
    futures = [worker.do(partial(done.append, i)) for i in range(100)]
    broken, last = worker.do(fail), worker.do(lambda: len(done))
    assert last.result(10) == 100 and done == list(range(100))
    assert all(future.done() for future in futures)
    with pytest.raises(ValueError, match="no"):
        broken.result()
    thread = worker.do(threading.current_thread).result(10)
    worker.close()
    thread.join(10)
    assert not thread.is_alive()
