"""Work that waits for storage, done some way ahead of its use."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_U = TypeVar("_U")


def ahead(function: Callable[[_T], _U], items: Iterable[_T], threads: int, depth: int) -> Generator[_U, None, None]:
    """The results of a function in the order of the items, computed in threads.

    Args:
        depth: results that are computed, or being so, and not yet taken: what bounds the memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[_U]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= depth:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
