"""The thread that loads the model and runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Does what it is given on one thread, one thing after the other; a daemon, so it keeps no process alive.

    OpenMP keeps a team of threads for every thread that has used it, and while there are more of them than cores its
    barriers sleep in place of spinning. A model that one thread loaded and another runs loses a fifth of its speed by
    that, so both are given to the same worker.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="ctc-drafter-model", daemon=True).start()

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Begin `work` when what was given before is done; what it returns or raises is in the future."""
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """End the thread when all that was given is done."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
