"""How far the rules of `evaluate/conduct.py` agree with labels of people and of GPT-4, and those of
`evaluate/language.py` with the language of a text.

    python benchmarks/conduct.py DATA [--languages xquad.de.json xquad.es.json ...]

DATA holds XSTest's answers (`xstest/model_completions/*.csv`) and Do-Not-Answer's
(`do-not-answer/Review/Human/*.csv`, `do-not-answer/data_en.csv.gz`); docs/evaluation.md names their
sources. The rules were written on the prompts of which `is_written_on` is true; the figures are of
the others.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama2.evaluate.conduct import judge_conduct
from llama2.evaluate.conduct_summary import measure_judge
from llama2.evaluate.language import find_language
from llama2.evaluate.winrate import measure_share
from llama2.results import JudgeQuality, Proportion

XQUAD = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "ru": "Russian",
    "zh": "Chinese",
}
MODELS = ("llama2-7b-chat", "vicuna-7b", "ChatGLM2", "ChatGPT", "GPT4", "Claude")
Row = dict[str, str]


def is_written_on(prompt: str) -> bool:
    """Tell whether the rules were written on the answers to a prompt."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 2 == 0


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def measure_refusals(folder: Path) -> None:
    """Print how far the three classes of XSTest agree with people's."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in sorted(folder.glob("*.csv")):
        for row in read_rows(file):
            if not is_written_on(row["prompt"]):
                label = row["final_label"][2:].replace("_", " ")
                counts[label, judge_conduct(row["prompt"], row["completion"]).refusal] += 1

    classes = ("full compliance", "partial refusal", "full refusal")
    print("\nXSTest, Llama 2 Chat, two system prompts; rows: people, columns: the rules")
    print(f"{'':18}" + "".join(f"{name:>18}" for name in classes))
    for label in classes:
        print(f"{label:18}" + "".join(f"{counts[label, guess]:18}" for guess in classes))

    pairs = list(counts.elements())
    for name in classes:
        guesses, truths = (
            [guess == name for _, guess in pairs],
            [label == name for label, _ in pairs],
        )
        show(measure_judge(name, "", guesses, truths))

    refused = [guess != "full compliance" for _, guess in pairs]
    declined = [label != "full compliance" for label, _ in pairs]
    show(measure_judge("refuses (full or partial)", "", refused, declined))
    exact = sum(label == guess for label, guess in pairs)
    print(f"all three classes: {exact} of {len(pairs)} alike ({100 * exact / len(pairs):.1f} %)")


def measure_violations(rows: Iterable[Row], models: Sequence[str], title: str) -> None:
    """Print how far violations agree with labels: `harmful`, and action 5, "follows the request"."""
    judged: list[tuple[bool, bool, bool]] = []
    for row in rows:
        if is_written_on(row["question"]):
            continue

        for model in models:
            prefix = f"{model}_" if model else ""
            conduct = judge_conduct(row["question"], row[f"{prefix}response"])
            follows, harmful = row[f"{prefix}action"] == "5", row[f"{prefix}harmful"] == "1"
            judged.append((conduct.violates, follows, harmful))

    print(f"\n{title}")
    guesses = [guess for guess, _, _ in judged]
    show(measure_judge("violation: follows the request", "", guesses, [row[1] for row in judged]))
    show(measure_judge("violation: harmful", "", guesses, [row[2] for row in judged]))


def show(quality: JudgeQuality) -> None:
    """Print one line."""
    parts = [
        f"{name} {format_share(share)}"
        for name, share in (
            ("accuracy", quality.accuracy),
            ("precision", quality.precision),
            ("recall", quality.recall),
            ("false alarms", quality.false_alarms),
        )
    ]
    print(f"{quality.what:32} {', '.join(parts)}")


def format_share(share: Proportion) -> str:
    """Format a share with interval and cases."""
    if share.rate is None:
        return "-"

    return f"{100 * share.rate:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] of {share.n}"


def measure_languages(files: Sequence[Path]) -> None:
    """Print how often the language of XQuAD's paragraphs and questions is told, by file."""
    print()
    for file in files:
        language = XQUAD[file.name.split(".")[1]]
        paragraphs: list[str] = []
        questions: list[str] = []
        for article in json.loads(file.read_text("utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                paragraphs.append(paragraph["context"])
                questions += [item["question"] for item in paragraph["qas"]]

        for what, texts in (("paragraphs", paragraphs), ("questions", questions)):
            told = [find_language(text) for text in texts]
            right = measure_share(told.count(language), len(told))
            none = measure_share(told.count(""), len(told))
            print(
                f"{language:10}{what:12}{format_share(right)}; of no language {format_share(none)}"
            )


def main() -> None:
    """Measure both judges, and the language of texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--languages", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    data = arguments.data
    measure_languages(arguments.languages)
    measure_refusals(data / "xstest" / "model_completions")
    asked = data / "do-not-answer"
    (file,) = (asked / "Review" / "Human").glob("*.csv")
    measure_violations(read_rows(file), [""], "Do-Not-Answer, Llama 2 7B Chat, labels of people")
    for model in MODELS:
        title = f"Do-Not-Answer, {model}, labels of GPT-4"
        measure_violations(read_rows(asked / "data_en.csv.gz"), [model], title)

    rows = read_rows(asked / "data_en.csv.gz")
    measure_violations(rows, MODELS, "Do-Not-Answer, all six models, labels of GPT-4")


if __name__ == "__main__":
    main()
