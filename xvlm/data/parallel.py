"""A map over several processes that keeps the order and holds little at once."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items a worker may be given before its results are taken


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function`` of each item, in the order of the items, whatever the number of worker processes; 0: in this one.

    Items are drawn as results are taken, so that a stream of any length fits in memory. ``function`` is sent to each
    worker once, and may be large.

    Raises:
        OSError: a worker was ended from outside. What ``function`` raises is raised here, in its item's place.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # The server forks before any thread starts here, which a plain fork of a process with torch in it cannot promise.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,))
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) == AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise OSError("a worker process was ended from outside; is there enough memory for so many workers?") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]  # of this worker


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next item for ever."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
