"""Whether transformers gives SentencePiece's ids on the directories that we write, in each of
several versions.

    python tests/cases/fast_tokenizers.py --python A/bin/python B/bin/python [--tokenizer FILE ...]
    [--conversations N]

Each interpreter has a version of transformers (`sentencepiece` and `jinja2` with it). The
tokenizers are one that is trained here, the same with the lowest scores for runs of spaces, as in
Meta's file, and those that are named. Of each version and tokenizer, fast and slow, it prints how
many conversations and texts get other ids; exit status 1 if any.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' helpers

from conversations import contents, conversations, trained, with_lowest_spaces

from llama2.records import messages_of
from llama2.tokenizer import Tokenizer, encode_dialog, encode_prompt

THEIRS = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
import transformers
transformers.logging.set_verbosity_error()
from transformers import AutoTokenizer
slow = {} if int(transformers.__version__.split(".")[0]) > 4 else {"slow": {"use_fast": False}}
with open(sys.argv[2], encoding="utf-8") as file:
    asked = [json.loads(line) for line in file]
for kind, options in {"fast": {}, **slow}.items():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
    found = []
    for one in asked:
        if isinstance(one, str):
            found.append(tokenizer.encode(one, add_special_tokens=False))
        else:
            ids = tokenizer.apply_chat_template(one, tokenize=True)
            found.append(list(ids["input_ids"] if hasattr(ids, "keys") else ids))
    print(json.dumps([transformers.__version__, kind, found]))
"""


def expected(tokenizer: Tokenizer, asked: str | list[dict[str, str]]) -> list[int]:
    """The ids of a text, or of a conversation, as SentencePiece and Meta's scheme have them."""
    if isinstance(asked, str):
        return tokenizer.encode(asked)

    messages = messages_of((one["role"], one["content"]) for one in asked)  # type: ignore[misc]
    finished = messages[-1].role == "assistant"
    return encode_dialog(tokenizer, messages)[0] if finished else encode_prompt(tokenizer, messages)


def texts(count: int, seed: int) -> list[str]:
    """Texts that begin with no space: transformers drops one."""
    draw = random.Random(seed)
    return [
        text
        for text in (contents(draw) for _ in range(count))
        if not text.startswith((" ", "\u2581"))
    ]


def main() -> int:
    """Print a line for each version, kind and tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], help="interpreters with transformers"
    )
    parser.add_argument(
        "--tokenizer", nargs="*", type=Path, default=[], help="more tokenizers to try"
    )
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    failed = False

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ordinary = trained(root / "trained")
        tokenizers = {
            "trained": ordinary,
            "lowest spaces": with_lowest_spaces(ordinary),
            **{str(path): Tokenizer.load(path) for path in given.tokenizer},
        }
        asked: list[str | list[dict[str, str]]] = [
            *conversations(given.conversations, given.seed),
            *texts(given.conversations // 10, given.seed),
        ]
        (root / "asked.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8"
        )

        for number, (name, tokenizer) in enumerate(tokenizers.items()):
            directory = root / str(number)
            tokenizer.save(directory)
            (directory / "config.json").write_text('{"model_type": "llama"}')
            ours = [expected(tokenizer, one) for one in asked]

            for python in given.python:
                done = subprocess.run(
                    [python, "-c", THEIRS, str(directory), str(root / "asked.jsonl")],
                    text=True,
                    capture_output=True,
                    encoding="utf-8",
                    check=False,
                )
                if done.returncode:
                    print(f"{python}: {done.stderr.strip().splitlines()[-1]}")
                    failed = True

                for line in done.stdout.splitlines():
                    version, kind, theirs = json.loads(line)
                    other = [
                        index
                        for index, pair in enumerate(zip(ours, theirs, strict=True))
                        if pair[0] != pair[1]
                    ]
                    print(
                        f"{name:15} transformers {version} {kind}: {len(other)} of {len(asked):,} differ"
                        + (f", first {asked[other[0]]!r}" if other else ""),
                        flush=True,
                    )
                    failed = failed or bool(other)

    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
