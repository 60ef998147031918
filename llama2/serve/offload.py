"""Work beside the event loop, so that one client's long request keeps nobody else waiting.

Python threads switch every few milliseconds, but only between two calls into C. What runs here
therefore makes many short calls instead of one long call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")
PAGE = 4000
"""bytes, characters or tokens that take less time than a change of threads"""

# one thread: several would take turns with the loop, each for as long
_executor = ThreadPoolExecutor(1, "offload")


async def offload(size: int, work: Callable[..., R], *arguments: object) -> R:
    """Return the result of `work`, done in a thread if its input has more than `PAGE` items."""
    if size <= PAGE:
        return work(*arguments)

    return await asyncio.get_running_loop().run_in_executor(_executor, work, *arguments)
