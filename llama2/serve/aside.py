"""Work beside the event loop, so that one client's long request keeps nobody else waiting.

A thread of Python lets go of the interpreter every few milliseconds, but only between two calls
into C. What runs here therefore makes many short calls where one would be long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")
PAGE = 4000
"""bytes, characters or tokens that take less time than a change of threads"""

# one: several would take turns with the loop, each for as long
_thread = ThreadPoolExecutor(1, "aside")


async def aside(size: int, work: Callable[..., R], *arguments: object) -> R:
    """The result of `work`, done in a thread if its input is longer than a page."""
    if size <= PAGE:
        return work(*arguments)

    return await asyncio.get_running_loop().run_in_executor(_thread, work, *arguments)
