"""What a case may check of a command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from run import Bench, Got

Work = Callable[["Bench"], tuple[bool, str]]


def is_refusal(got: Got, pattern: str) -> bool:
    return got.status == 2 and not got.crashed and bool(re.search(pattern, got.said, re.IGNORECASE))


def ok(got: Got, test: Callable[[Got], bool]) -> tuple[bool, str]:
    return got.status == 0 and test(got), got.short()


def refusal(got: Got, pattern: str) -> tuple[bool, str]:
    return is_refusal(got, pattern), got.short()


def leaves_apart(bench: Bench, file: Path | str, share: float) -> tuple[bool, str]:
    """`sft` trains on no conversation that it holds out, though it reads each three times."""
    from llama2.runs import Run
    from llama2.stages import sft

    config = sft.Config(
        out=bench.scratch / "leak",
        model=bench.model,
        heldout=share,
        dialogs={"a": {"path": file, "weight": 3}},
    )
    sets, heldout = sft.read_dialogs(config, Run(bench.scratch / "leak", False))
    both = {one.messages for some in sets.values() for one in some} & {
        one.messages for one in heldout
    }

    return bool(heldout) and not both, f"{len(heldout)} held out, {len(both)} of them trained on"
