"""Run directories: what was asked, what it was made from, what it holds, and whether it is
finished."""

from llama2.runs.completion import COMPLETE, MANIFEST, METRICS, WARNINGS
from llama2.runs.run import (
    CHECKPOINTS,
    Run,
    Stopped,
    check,
    code_version,
    fingerprint,
    is_finished,
    is_output,
    lock,
    open_run,
    read_list,
    read_metrics,
    read_warnings,
    recorded,
)

__all__ = [
    "CHECKPOINTS",
    "COMPLETE",
    "MANIFEST",
    "METRICS",
    "WARNINGS",
    "Run",
    "Stopped",
    "check",
    "code_version",
    "fingerprint",
    "is_finished",
    "is_output",
    "lock",
    "open_run",
    "read_list",
    "read_metrics",
    "read_warnings",
    "recorded",
]
