"""Command lines: one that is right for every verb, and how one is made wrong.

`llama2 VERB ...` is kept as a JSON file of its words and of every flag that the verb has, so that
it can be damaged as any other file is. In the words, ALL is the folder of all undamaged files, OUT
a directory of the command's own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from llama2.config import schema
from llama2.recipe import launch

RUNS = "ALL/runs/recipe"
_WORLD = f"{RUNS}/world"
_REWARDS = ("--rewards.helpful", f"{RUNS}/helpful", "--rewards.safe", f"{RUNS}/safe")
_SHORT = ("--sample.max-tokens", "2", "--sample.slots", "2")
_STEP = ("--training.plan.max-steps", "1", "--training.plan.warmup-steps", "0")
RIGHT: dict[str, tuple[str, ...]] = {
    "world": ("--scale", "0.005"),
    "prepare": ("--kind", "dialogs", "--sources.a.path", "ALL/dialogs.jsonl/a.jsonl"),
    "import": ("ALL/ours",),
    "clean": ("--sources.a.path", "ALL/documents.jsonl/a.jsonl", "--heldout", "0"),
    "tokenizer": ("--documents", f"{RUNS}/clean/documents", "--vocab-size", "330"),
    "tokenize": ("--documents", f"{RUNS}/clean", "--tokenizer", f"{RUNS}/tokenizer"),
    "pretrain": (
        "--shards",
        f"{RUNS}/tokenize",
        "--model",
        f"{RUNS}/pretrain",
        "--sequence-length",
        "32",
        "--batch-size",
        "2",
        *_STEP,
    ),
    "sft": (
        "--model",
        f"{RUNS}/pretrain",
        "--dialogs.a.path",
        f"{_WORLD}/demonstrations.jsonl",
        "--sequence-length",
        "96",
        "--batch-size",
        "2",
        *_STEP,
    ),
    "collect": (
        "--policies",
        f"{RUNS}/sft",
        "--prompts",
        f"{_WORLD}/prompts-train.jsonl",
        "--limit",
        "4",
        *_SHORT,
    ),
    "reward": (
        "--model",
        f"{RUNS}/sft",
        "--preferences.a.path",
        f"{RUNS}/collect/preferences.jsonl",
        "--batch-size",
        "4",
        *_STEP,
    ),
    "rejection": (
        "--policy",
        f"{RUNS}/sft",
        *_REWARDS,
        "--prompts",
        f"{_WORLD}/prompts-train.jsonl",
        "--limit",
        "2",
        "--k",
        "2",
        "--temperatures",
        "1.0",
        *_SHORT,
    ),
    "ppo": (
        "--policy",
        f"{RUNS}/sft",
        *_REWARDS,
        "--prompts",
        f"{_WORLD}/prompts-train.jsonl",
        "--iterations",
        "1",
        "--batch-size",
        "4",
        "--minibatch-size",
        "4",
        *_SHORT,
        "--training.plan.warmup-steps",
        "0",
    ),
    "ghost": (
        "--policy",
        f"{RUNS}/sft",
        "--conversations",
        f"{_WORLD}/ghost-train.jsonl",
        "--limit",
        "2",
        *_SHORT,
    ),
    "distill": (
        "--policy",
        f"{RUNS}/sft",
        *_REWARDS,
        "--prompts",
        f"{_WORLD}/prompts-train.jsonl",
        "--limit",
        "2",
        "--preprompts",
        "Be kind.",
        *_SHORT,
    ),
    "select": (
        "--candidate",
        f"{RUNS}/v1_candidate",
        "--predecessor",
        f"{RUNS}/sft",
        "--prompts",
        f"{_WORLD}/prompts-validation.jsonl",
        "--limit",
        "2",
        *_SHORT,
    ),
    "evaluate": (
        "--versions.a",
        f"{RUNS}/sft",
        "--versions.b",
        f"{RUNS}/v1",
        "--prompts",
        f"{_WORLD}/prompts-evaluation.jsonl",
        "--limit",
        "3",
        "--max-tokens",
        "2",
    ),
    "report": ("--recipe", RUNS),
    "export": (f"{RUNS}/sft", "--to", "hf"),
    "verify": (f"{RUNS}/sft", f"{RUNS}/sft"),
    "release": (f"{RUNS}/v1",),
    "carbon": ("--hours", "10", "--watts", "400"),
    "chat": (f"{RUNS}/sft", "--max-tokens", "2"),
    "serve": (f"{RUNS}/sft", "--port", "0"),
}
WITHOUT_OUT = {"verify", "carbon", "chat", "serve"}
ODD = [
    "",
    " ",
    "0",
    "-1",
    "1.5",
    "1e400",
    "nan",
    "-inf",
    "true",
    "null",
    "[]",
    "{}",
    "[1, 2",
    "{a: 1}",
    "a=b",
    "--",
    "-x",
    "~",
    "~nobody/x",
    "\u00e9",
    "\udcff",
    "x" * 3000,
    "../../x",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "\x1b[2J",
    "9" * 400,
    "*",
    "**",
    "[",
    "a,b",
    "0x10",
    "1_000",
    "2001-01-01",
    "!!python/name:os.system",
    "&a",
    "*a",
    ".",
    "\n",
    "ALL",
    "ALL/nothing",
    f"{RUNS}/sft",
    f"{_WORLD}/demonstrations.jsonl",
    "ALL/ours/config.json",
    "fp32",
    "helpful",
]
SMALL = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "1e308",
    "true",
    "false",
    "null",
    "",
]
"""what a run ends soon with, if it takes it"""


def write(folder: Path) -> None:
    """A file for every verb."""
    for verb, words in RIGHT.items():
        place = folder / "words" / verb
        place.mkdir(parents=True)
        found = {
            "words": [verb, *words, *(() if verb in WITHOUT_OUT else ("--out", "OUT"))],
            "flags": flags(verb),
        }
        (place / "words.json").write_text(json.dumps(found))


def flags(verb: str) -> list[str]:
    """Every flag of a verb, and one that it has not."""
    config = launch.load(verb).Config
    return [
        f"--{schema.spell_flag(*names)}".replace("NAME", "a")
        for names, _ in schema.list_leaves(config)
    ] + ["--no-such"]


def in_words(chance: random.Random, content: bytes) -> bytes:
    """One or two words changed, lost, doubled or misspelt, or a flag more; values of any kind."""
    return _changed(chance, content, ODD)


def in_values(chance: random.Random, content: bytes) -> bytes:
    """One or two numbers or switches given; the rest of the command is right."""
    found = json.loads(content)
    for _ in range(chance.choice([1, 1, 2])):
        found["words"] += [chance.choice(found["flags"]), chance.choice(SMALL)]

    return json.dumps(found).encode()


def _changed(chance: random.Random, content: bytes, values: list[str]) -> bytes:
    found = json.loads(content)
    words = found["words"]
    for _ in range(chance.choice([1, 1, 2])):
        place = chance.randrange(len(words))
        match chance.randrange(7):
            case 0:
                words[place] = chance.choice(values)
            case 1:
                del words[place]
            case 2:
                words.insert(place, words[place])
            case 3:
                word = words[place]
                words[place] = chance.choice([word.upper(), word[:-1], word + "x", "-" + word])
            case 4:
                words.insert(place, chance.choice(values))
            case 5:
                words += [f"{chance.choice(found['flags'])}={chance.choice(values)}"]
            case _:
                words += [chance.choice(found["flags"]), chance.choice(values)]

        if not words:
            break

    return json.dumps(found).encode()
