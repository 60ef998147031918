"""Runs under an interpreter that has lm-eval: what its clients of a server say against what its own
backend computes.

Arguments: the address of a server, the name of the model there, its directory, and a JSON file
{"items": [[context, [choice, ...]], ...], "texts": [...], "chats": [...]}. Prints one JSON object:
the greatest differences, and counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

UNTIL = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}


def requests(kind: str, rows: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def main(url: str, name: str, directory: str, file: str) -> dict:
    asked = json.loads(Path(file).read_bytes())
    here = HFLM(
        pretrained=directory, dtype="float32", device="cpu", batch_size=8, add_bos_token=True
    )
    there = LocalCompletionsAPI(
        model=name,
        base_url=f"{url}/v1/completions",
        tokenizer=directory,
        batch_size=8,
        max_length=here.max_length,
        add_bos_token=True,
    )
    pairs = [(context, choice) for context, choices in asked["items"] for choice in choices]
    found = {}
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", pairs)) for lm in (there, here))
    found["loglikelihood"] = max(abs(one[0] - other[0]) for one, other in zip(ours, theirs))
    found["greedy"] = sum(bool(one[1]) != bool(other[1]) for one, other in zip(ours, theirs))
    found["right"] = sum(
        best(ours, asked["items"], index) == best(theirs, asked["items"], index)
        for index in range(len(asked["items"]))
    )
    found["items"], found["pairs"] = len(asked["items"]), len(pairs)
    ours, theirs = (
        lm.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,) for text in asked["texts"]])
        )
        for lm in (there, here)
    )
    found["rolling"] = max(abs(one - other) for one, other in zip(ours, theirs))
    ours, theirs = (
        lm.generate_until(
            requests("generate_until", [(context, dict(UNTIL)) for context, _ in asked["items"]])
        )
        for lm in (there, here)
    )
    found["generations"] = differing(ours, theirs)

    if asked["chats"]:
        chat = LocalChatCompletion(
            model=name,
            base_url=f"{url}/v1/chat/completions",
            tokenizer_backend=None,
            tokenized_requests=False,
        )
        turns = [[{"role": "user", "content": text}] for text in asked["chats"]]
        ours = chat.generate_until(
            requests(
                "generate_until", [(chat.apply_chat_template(each), dict(UNTIL)) for each in turns]
            )
        )
        here.add_bos_token = False  # the template writes it
        theirs = here.generate_until(
            requests(
                "generate_until", [(here.apply_chat_template(each), dict(UNTIL)) for each in turns]
            )
        )
        found["chats"], found["said"] = differing(ours, theirs), sum(bool(one) for one in ours)

    return found


def differing(ours: list[str], theirs: list[str]) -> int:
    """How many texts differ, but for the space in front that its own backend loses."""
    return sum(one.strip() != other.strip() for one, other in zip(ours, theirs))


def best(scores: list, items: list, index: int) -> int:
    start = sum(len(choices) for _, choices in items[:index])
    values = [score[0] for score in scores[start : start + len(items[index][1])]]
    return values.index(max(values))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
