"""Work that background threads do ahead of the one who takes its results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def done_ahead(work: Callable[[T], R], jobs: Iterable[T], threads: int) -> Generator[R]:
    """Yield the results of jobs in their order, each after at most two jobs a thread have been begun ahead of it.

    Closed early, it begins no further job; one that a thread is at is done to its end. An error is raised where its
    job's result would come.

    Args:
        threads: With 0, a job is done when its result is asked for.
    """
    if not threads:
        yield from map(work, jobs)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
