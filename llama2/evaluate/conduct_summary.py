"""Shares of refusals, violations and degenerate answers of all versions, and their differences on
the same prompts (§4.2.3, §4.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from llama2.evaluate.conduct import Conduct, judge_conduct
from llama2.evaluate.judges import KINDS, PromptKind
from llama2.evaluate.winrate import compare_marks, measure_share
from llama2.records import Prompt
from llama2.results import ConductDifference, ConductResult, JudgeQuality, Proportion

Test = Callable[[Conduct], bool]


def judge_answers(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Conduct]:
    """Judge the answer to each prompt by the rules."""
    pairs = zip(prompts, answers, strict=True)
    return [judge_conduct(prompt.messages[-1].content, answer) for prompt, answer in pairs]


def measure_conduct(
    prompts: Sequence[Prompt], kinds: Sequence[PromptKind], conducts: Sequence[Conduct]
) -> ConductResult:
    """Measure one version, by kind of prompt; kinds without prompts are left out."""
    by_kind: dict[str, list[Conduct]] = {}
    by_source: dict[str, list[Conduct]] = {}
    for prompt, kind, conduct in zip(prompts, kinds, conducts, strict=True):
        by_kind.setdefault(kind, []).append(conduct)
        if kind == "unsafe":
            by_source.setdefault(str(prompt.metadata.get("source", "")), []).append(conduct)

    several = len(by_source) > 1
    return ConductResult(
        refusals=_share_each(by_kind, _refuses),
        full_refusals=_share_each(by_kind, _refuses_in_full),
        violations=_share(by_kind.get("unsafe", []), _violates),
        violations_by_source=_share_each(by_source if several else {}, _violates),
        degenerate=_share_each(by_kind, _is_degenerate),
    )


def compare_conduct(
    kinds: Sequence[PromptKind], versions: Mapping[str, Sequence[Conduct]]
) -> Iterator[ConductDifference]:
    """Compare each version with the first on the same prompts: what the one does and the other does
    not."""
    first, *others = versions
    for name in others:
        for kind in KINDS:
            places = [place for place, each in enumerate(kinds) if each == kind]
            tests: dict[str, Test] = {"refusals": _refuses, "degenerate": _is_degenerate}
            if kind == "unsafe":
                tests = {"violations": _violates, **tests}

            for measure, test in tests.items() if places else ():
                ours = [float(test(versions[name][place])) for place in places]
                theirs = [float(test(versions[first][place])) for place in places]
                yield ConductDifference(
                    measure=measure,
                    kind=kind,
                    version=name,
                    against=first,
                    difference=compare_marks(ours, theirs),
                )


def _share_each(groups: Mapping[str, Sequence[Conduct]], test: Test) -> dict[str, Proportion]:
    return {name: _share(groups[name], test) for name in sorted(groups)}


def _share(conducts: Sequence[Conduct], test: Test) -> Proportion:
    return measure_share(sum(map(test, conducts)), len(conducts))


def _refuses(conduct: Conduct) -> bool:
    return conduct.refuses


def _refuses_in_full(conduct: Conduct) -> bool:
    return conduct.refuses and conduct.refusal == "full refusal"


def _violates(conduct: Conduct) -> bool:
    return conduct.violates


def _is_degenerate(conduct: Conduct) -> bool:
    return bool(conduct.degenerate)


# --- the judge itself ---
def measure_judge(
    what: str, labels: str, guesses: Sequence[bool], truths: Sequence[bool]
) -> JudgeQuality:
    """Measure a judge on labels that it was not made of."""
    hits = [guess and truth for guess, truth in zip(guesses, truths, strict=True)]
    agreements = [guess == truth for guess, truth in zip(guesses, truths)]
    alarms = sum(guesses) - sum(hits)
    return JudgeQuality(
        what=what,
        labels=labels,
        accuracy=measure_share(sum(agreements), len(agreements)),
        precision=measure_share(sum(hits), sum(guesses)),
        recall=measure_share(sum(hits), sum(truths)),
        false_alarms=measure_share(alarms, len(truths) - sum(truths)),
    )


_MEASURED = (
    (
        "refusals",
        "people's, of 222 answers of Llama 2 Chat to 111 prompts of XSTest",
        155,
        5,
        2,
        60,
    ),
    (
        "violations",
        "GPT-4's, of 1,428 answers of six models to 238 questions of Do-Not-Answer",
        34,
        87,
        8,
        1299,
    ),
)
"""what, whose labels; answers rightly named, wrongly named, missed, rightly passed over"""


def describe_judges() -> list[JudgeQuality]:
    """Return how well the rules agree with labels on prompts that they were not written on; the
    counts are those of `benchmarks/conduct.py`."""
    return [_restore(*row) for row in _MEASURED]


def _restore(
    what: str, labels: str, hits: int, alarms: int, misses: int, passes: int
) -> JudgeQuality:
    guesses = [True] * (hits + alarms) + [False] * (misses + passes)
    truths = [True] * hits + [False] * alarms + [True] * misses + [False] * passes
    return measure_judge(what, labels, guesses, truths)
