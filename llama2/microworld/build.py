"""A whole microworld in a directory: documents, demonstrations, prompts and question lists as JSON
Lines.

At scale 1 and 2.0M tokens of documents it feeds a model of a million parameters through the whole
recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llama2 import records
from llama2.errors import UserError
from llama2.microworld.demonstrations import draw_demonstrations
from llama2.microworld.documents import SHARES, write_documents
from llama2.microworld.prompts import SPLITS, PromptSplit, draw_ghost_prompts, draw_prompts
from llama2.microworld.world import World

TOKENS = 2_000_000
DEMONSTRATIONS = 6_000
PROMPTS: dict[PromptSplit, int] = {"train": 9_000, "validation": 600, "evaluation": 900}
GHOST: dict[PromptSplit, int] = {"train": 400, "validation": 40, "evaluation": 60}


def write(directory: str | os.PathLike[str], seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write the world of `seed` and return the number of records of each file.

    `scale` in (0, 1] shrinks every count (the world itself stays whole). Files:
    `documents/<source>.jsonl`, `demonstrations.jsonl`, `prompts-<split>.jsonl`,
    `ghost-<split>.jsonl`. Each is written atomically and is a pure function of (seed, scale).
    """
    if not 0 < scale <= 1:
        raise UserError(f"scale is {scale}", "choose a scale above 0 and at most 1")

    world, root = World.build(seed), Path(directory)
    files: dict[str, Iterable[object]] = {}
    for source in SHARES:
        documents = write_documents(world, round(TOKENS * scale), sources=(source,))
        files[f"documents/{source}.jsonl"] = documents

    count = _scale(DEMONSTRATIONS, scale)
    files["demonstrations.jsonl"] = draw_demonstrations(world, count)
    for split in SPLITS:
        count, ghost_count = _scale(PROMPTS[split], scale), _scale(GHOST[split], scale)
        files[f"prompts-{split}.jsonl"] = draw_prompts(world, split, count)
        files[f"ghost-{split}.jsonl"] = draw_ghost_prompts(world, split, ghost_count)

    return {name: records.write(root / name, rows) for name, rows in files.items()}


def _scale(count: int, scale: float) -> int:
    return max(8, round(count * scale))
