"""Figure 10: how much versions attend to the instruction of the first turn, one model in memory at
a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama2.evaluate import attention
from llama2.evaluate.ghost import GhostDialog
from llama2.formats.checkpoint import config_of, open_tokenizer
from llama2.model.llama import Llama
from llama2.records import Messages
from llama2.runs import Run
from llama2.runs.parts import work_in_parts
from llama2.stages.common.answers import load_when_needed
from llama2.tokenizer.tokenizer import Tokenizer

ATTENTION_DIALOGS = 16


def draw_attention(
    run: Run,
    versions: Mapping[str, Path],
    names: Sequence[str],
    load: Callable[[str], tuple[Llama, Tokenizer]],
    dialogs: Sequence[GhostDialog],
    talks: Sequence[Messages],
) -> dict[str, Any] | None:
    """Return Figure 10 of the first dialogs, with the answers of the last version asked for, as
    `AttentionResult` has it; one model after the other. None where no dialog was held."""
    pairs = zip(talks, dialogs, strict=True)
    shown = [(talk, dialog.instruction) for talk, dialog in pairs if talk][:ATTENTION_DIALOGS]
    if not shown:
        return None

    device = run.ranks.device
    tokenizer = open_tokenizer(versions[names[-1]])
    context = min(config_of(versions[name]).max_position_embeddings for name in names)
    looks: dict[str, list[attention.Look]] = {}
    for name in names:
        with load_when_needed(partial(load, name), device) as version:

            def look(part: Sequence[attention.Talk], first: int) -> list[Any]:
                model, _ = version()
                seen = [attention.look(model, tokenizer, talk, context) for talk in part]
                return [[each.starts, each.map] for each in seen]

            part = f"attention-{list(versions).index(name)}"
            rows = work_in_parts(run, part, shown, len(shown), look)
            looks[name] = [attention.Look(*row) for row in rows]

    return attention.figure(looks, tokenizer, shown, context)
