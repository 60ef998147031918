"""Run directories: what was asked, what it was made from, what it holds, and whether it is
finished."""

from llama2.runs.completion import CHECKPOINTS, COMPLETE, MANIFEST, METRICS, WARNINGS
from llama2.runs.fingerprints import fingerprint, is_output, read_code_version, read_fingerprint
from llama2.runs.locks import lock
from llama2.runs.logs import read_list, read_metrics, read_warnings
from llama2.runs.manifest import check, is_finished
from llama2.runs.run import Run, Stopped, open_run

__all__ = [
    "CHECKPOINTS",
    "COMPLETE",
    "MANIFEST",
    "METRICS",
    "WARNINGS",
    "Run",
    "Stopped",
    "check",
    "fingerprint",
    "is_finished",
    "is_output",
    "lock",
    "open_run",
    "read_code_version",
    "read_fingerprint",
    "read_list",
    "read_metrics",
    "read_warnings",
]
