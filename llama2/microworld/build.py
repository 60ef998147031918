"""Writes a whole microworld to a directory: documents, demonstrations, prompts and question lists
as JSON Lines.

At scale 1 and 2.0M tokens of documents it feeds a model of a million parameters through the whole
recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llama2 import records
from llama2.errors import UserError
from llama2.microworld.demonstrations import demonstrations
from llama2.microworld.documents import SHARES, documents
from llama2.microworld.prompts import SPLITS, Split, ghost, prompts
from llama2.microworld.world import World

TOKENS = 2_000_000
DEMONSTRATIONS = 6_000
PROMPTS: dict[Split, int] = {"train": 9_000, "validation": 600, "evaluation": 900}
GHOST: dict[Split, int] = {"train": 400, "validation": 40, "evaluation": 60}


def write(directory: str | os.PathLike[str], seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write the world of `seed` and return the number of records of each file.

    `scale` in (0, 1] shrinks every count (the world itself stays whole). Files:
    `documents/<source>.jsonl`, `demonstrations.jsonl`, `prompts-<split>.jsonl`,
    `ghost-<split>.jsonl`. Each is written atomically and is a pure function of (seed, scale).
    """
    if not 0 < scale <= 1:
        raise UserError(f"scale is {scale}", "choose a scale above 0 and at most 1")

    world, root = World.build(seed), Path(directory)
    files: dict[str, Iterable[object]] = {
        f"documents/{source}.jsonl": documents(world, round(TOKENS * scale), sources=(source,))
        for source in SHARES
    }
    files["demonstrations.jsonl"] = demonstrations(world, _count(DEMONSTRATIONS, scale))

    for split in SPLITS:
        files[f"prompts-{split}.jsonl"] = prompts(world, split, _count(PROMPTS[split], scale))
        files[f"ghost-{split}.jsonl"] = ghost(world, split, _count(GHOST[split], scale))

    return {name: records.write(root / name, rows) for name, rows in files.items()}


def _count(count: int, scale: float) -> int:
    return max(8, round(count * scale))
