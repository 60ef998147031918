"""The synthetic world of the demo, written to files: documents, demonstrations and prompts
(docs/microworld.md)."""

from __future__ import annotations

from pydantic import Field

from llama2.config import StageConfig
from llama2.microworld.build import write
from llama2.results import WorldResult
from llama2.runs import Run


class Config(StageConfig):
    """Make a small world with ground truth."""

    scale: float = Field(1.0, gt=0, le=1)
    """1 is the demo's world; less shrinks every file"""


def run(config: Config, run: Run) -> None:
    """Write the world's files below the run directory."""
    if run.ranks.is_main:
        run.write_result(WorldResult(records=write(run.path, config.seed, config.scale)))
