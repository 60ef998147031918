"""Rows as strangers write them, imported: what became of them, and what was counted."""

import json
from pathlib import Path

from llama2.importers.dialogs import import_dialogs
from llama2.importers.preferences import import_preferences
from llama2.importers.prompts import import_prompts
from llama2.importers.tables import ReadOptions
from llama2.tally import Tally


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dialogs(folder: Path, *rows: object, **how):
    """The dialogs as (texts of the turns, train), and the tally."""
    tally = Tally()
    read = import_dialogs(write(folder / "rows.jsonl", *rows), ReadOptions(**how), tally=tally)
    return [(tuple(m.content for m in dialog.messages), dialog.train) for dialog in read], tally


def prompts(folder: Path, *rows: object, **how):
    """The texts of the prompts' last turns, and the tally."""
    tally = Tally()
    read = import_prompts(write(folder / "rows.jsonl", *rows), ReadOptions(**how), tally=tally)
    return [prompt.messages[-1].content for prompt in read], tally


def comparisons(folder: Path, *rows: object, **how):
    """The comparisons as (texts of the prompt, chosen, rejected, degree), and the tally."""
    tally = Tally()
    read = import_preferences(write(folder / "rows.jsonl", *rows), ReadOptions(**how), tally=tally)
    return [
        (tuple(m.content for m in p.prompt), p.chosen.text, p.rejected.text, p.degree) for p in read
    ], tally


def turns(*said: object) -> list[dict[str, object]]:
    """Texts as user and assistant turns; a mapping is an assistant turn with more keys."""
    return [
        {
            "role": ("user", "assistant")[index % 2],
            **(item if isinstance(item, dict) else {"content": item}),
        }
        for index, item in enumerate(said)
    ]
