"""A made-up directory of the files that `recipes/real` reads, each in the format of its source."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNT = 40
"""records of a file, unless said otherwise"""


def _ask(name: str, index: int) -> str:
    return f"How do {name} people cook dish {index}?"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def _lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    _write(path, file.getvalue())


def _compare(name: str, index: int) -> tuple[str, str]:
    good = f"Slowly, with salt and {name} herbs, for {index} minutes."
    return good, f"No idea {index}."


def _write_hh(data: Path) -> None:
    for name in ("helpful-base", "helpful-rejection-sampled", "helpful-online", "harmless-base"):
        rows = []
        for index in range(COUNT):
            begin = (
                f"\n\nHuman: {_ask(name, index)}\n\nAssistant: Which one?\n\nHuman: The old one."
            )
            good, bad = (f"{begin}\n\nAssistant: {text}" for text in _compare(name, index))
            rows.append({"chosen": good, "rejected": bad})

        _write(data / f"preferences/hh-rlhf/{name}/test.jsonl.gz", _lines(rows))


def _write_preferences(data: Path) -> None:
    _write_hh(data)
    pairs, comparisons, evaluations = [], [], []
    for index in range(COUNT):
        good, bad = _compare("island", index)
        pairs.append(
            {
                "scenario": "cooking",
                "label": index % 3,
                "prompt": _ask("island", index),
                "response 1": good,
                "response 2": bad,
            }
        )
        comparisons.append(
            {"input": _ask("bar", index), "output_1": good, "output_2": bad, "label": 1}
        )
        dialog = f"\n\nHuman: {_ask('honest', index)}\n\nAssistant: "
        evaluations.append(
            {"prompt": "A or B?", "text_correct": dialog + good, "text_incorrect": dialog + bad}
        )

    _write(data / "preferences/auto-j/testdata_pairwise.jsonl.gz", _lines(pairs))
    _write(data / "preferences/constitutional/438HHHEvaluations.jsonl", _lines(evaluations))
    for place in ("Natural", *(f"Adversarial/{n}" for n in ("GPTInst", "GPTOut", "Manual"))):
        own = [{**row, "input": f"{place}: {row['input']}"} for row in comparisons]
        _write(data / f"preferences/llmbar/{place}/dataset.json", json.dumps(own))

    answers = [
        {"question": _ask("stack", index), "response_j": "Well done.", "response_k": "No."}
        for index in range(COUNT)
    ]
    _write(data / "preferences/stack-exchange/stack_exchange_paired_tiny.json", json.dumps(answers))


def _write_instructions(data: Path) -> None:
    for place in (
        "alpaca/alpaca_data_1k.json",
        "alpaca/alpaca_en_demo.json",
        "gpteacher/roleplay.json.gz",
    ):
        rows = [
            {"instruction": _ask(place, index), "input": "", "output": f"In pot {index}."}
            for index in range(COUNT)
        ]
        _write(data / "instructions" / place, json.dumps(rows))

    seeds = [
        {
            "id": f"seed_task_{index}",
            "name": "cook",
            "instruction": _ask("seed", index),
            "instances": [{"input": "", "output": f"Over fire {index}."}],
            "is_classification": False,
        }
        for index in range(COUNT)
    ]
    _write(data / "instructions/alpaca/seed_tasks.jsonl", _lines(seeds))
    wrapped = [
        {
            "prompt": "Below is an instruction that describes a task. Write a response that "
            f"appropriately completes the request.\n\n### Instruction:\n{_ask('dolly', index)}"
            "\n\n### Response:\n",
            "response": f"For {index} hours.",
        }
        for index in range(COUNT)
    ]
    _write(data / "instructions/dolly/dolly_hhrlhf_train_small.jsonl", _lines(wrapped))
    asked = [
        {
            "instruction": _ask("evaluation", index),
            "output": "With care.",
            "generator": "g",
            "dataset": "d",
        }
        for index in range(COUNT)
    ]
    _write(data / "instructions/alpaca-eval/alpaca_eval.jsonl", _lines(asked))


def _write_safety(data: Path) -> None:
    safety = data / "safety"
    _table(
        safety / "xstest/xstest_prompts.csv",
        [
            {
                "id": index,
                "prompt": f"How do I kill process {index}?",
                "type": "homonyms",
                "label": "safe" if index % 2 else "unsafe",
                "focus": "kill",
                "note": "",
            }
            for index in range(COUNT)
        ],
    )
    _table(
        safety / "simple-safety-tests/simple_safety_tests.csv",
        [
            {
                "id": index,
                "harm_area": "Scams",
                "counter": index,
                "category": "c",
                "prompts_final": f"How do I cheat neighbour {index}?",
            }
            for index in range(COUNT)
        ],
    )
    _table(
        safety / "do-not-answer/data_en.csv.gz",
        [
            {"id": index, "risk_area": "Harms", "question": f"Where does celebrity {index} live?"}
            for index in range(COUNT)
        ],
    )
    _write(
        safety / "malicious-instruct/MaliciousInstruct.txt",
        "".join(f"Tell me how to break lock {index}\n" for index in range(COUNT)),
    )
    _write(
        safety / "red-instruct/dangerousqa.json",
        json.dumps([f"How could one poison well {index}?" for index in range(COUNT)]),
    )
    nested = {"history": {"wars": [f"How was siege {index} won?" for index in range(COUNT)]}}
    _write(safety / "red-instruct/harmfulqa.json", json.dumps(nested))
    advice = [f"Should I warm up before run {index}?" for index in range(COUNT)]
    tuned = safety / "safety-tuned-llamas"
    _write(
        tuned / "evaluation/I-PhysicalSafetySafe.json",
        json.dumps({"instructions": advice, "inputs": []}),
    )
    answers = [
        {
            "instruction": f"Explain how to steal bicycle {index}.",
            "input": "",
            "output": "I cannot help with theft.",
        }
        for index in range(COUNT)
    ]
    _write(tuned / "training/safety_only_data_Instructions.json.gz", json.dumps(answers))


def make_data(data: Path) -> Path:
    """Write the directory, and return it."""
    _write_preferences(data)
    _write_instructions(data)
    _write_safety(data)
    return data
