"""Keep the prompts that leave room for an answer: an example of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2 import records
from llama2.config import StageConfig
from llama2.records import Prompt
from llama2.results import StageResult
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, PlannedRuns
from llama2.tally import Tally
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


# --8<-- [start:config]
class Config(StageConfig):
    """Keep short prompts."""

    tokenizer: Path
    """a tokenizer.model, or a directory that holds one"""
    prompts: Path
    """prompts, one JSON object a line"""
    max_tokens: int = Field(512, gt=0)
    """length of the longest prompt that stays, in tokens, the tags of the chat format included"""


# --8<-- [end:config]


# --8<-- [start:result]
class ShortenResult(StageResult):
    """What is left of the prompts."""

    stage = "shorten"

    prompts: int
    """that stay"""
    longest: int
    """tokens of the longest of them"""


# --8<-- [end:result]


# --8<-- [start:run]
def run(config: Config, run: Run) -> None:
    """Write prompts.jsonl and summary.json."""
    if not run.ranks.is_main:
        return

    tokenizer = Tokenizer.load(config.tokenizer)
    lengths: list[int] = []
    prompts = select_short(config, tokenizer, run.tally("prompts"), lengths)

    records.write(run.path / "prompts.jsonl", prompts)
    run.write_result(ShortenResult(prompts=len(lengths), longest=max(lengths, default=0)))


def select_short(
    config: Config, tokenizer: Tokenizer, tally: Tally, lengths: list[int]
) -> Iterator[Prompt]:
    """Yield the prompts that are short enough, and append their lengths in tokens to `lengths`."""
    for prompt in records.read(Prompt, config.prompts):
        tally.read += 1
        length = len(encode_prompt(tokenizer, prompt.messages))

        if length > config.max_tokens:
            tally.skip("too long", f"--max-tokens {length} keeps it")
            continue

        tally.kept += 1
        lengths.append(length)
        yield prompt


# --8<-- [end:run]


# --8<-- [start:plan]
def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return what a dry run shows: the vocabulary, which later steps inherit."""
    return planned.inherit_vocabulary(config.out, config.tokenizer)


# --8<-- [end:plan]
