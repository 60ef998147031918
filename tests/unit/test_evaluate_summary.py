"""Win rates, distributions and the figures made of answers and scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from llama2.evaluate import summary
from llama2.evaluate.judges import classify, rate
from llama2.evaluate.winrate import (
    bound_difference,
    bound_net_wins,
    bound_ratio,
    bound_share,
    compare,
    compare_marks,
    correlate,
    measure_mean,
    measure_share,
)
from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.judging import Rating
from llama2.microworld.rater import GroundTruth
from llama2.records import Message, Prompt
from llama2.results import EvaluateResult, Mean, SamplingSettings
from llama2.stages import evaluate


def answer(text: str, tokens: int = 3, finish: str = "stop") -> Answer:
    return Answer(text, Completion((1,), (5,) * tokens, (-1.0,) * tokens, finish))  # type: ignore[arg-type]


def prompt(family: str | None, safety: bool = False, id: str = "p") -> Prompt:
    return Prompt(
        (Message("user", "Hi?"),), id, safety, {} if family is None else {"family": family}
    )


def test_wilson_matches_published_values() -> None:
    low, high = bound_share(8, 10)  # Newcombe 1998: 0.4902 to 0.9433
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert bound_share(0, 0) == (0.0, 1.0)
    assert bound_share(0, 20)[0] == 0.0
    assert bound_share(20, 20)[1] == pytest.approx(1.0)


def test_wilson_covers_the_truth_in_about_95_of_100() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        hits = sum(rng.random() < 0.8 for _ in range(50))
        low, high = bound_share(hits, 50)
        covered += low <= 0.8 <= high

    assert 925 <= covered <= 975


def test_difference_of_shares_matches_published_values() -> None:
    low, high = bound_difference(
        measure_share(56, 70), measure_share(48, 80)
    )  # Newcombe 1998, method 10
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert bound_difference(measure_share(0, 2), measure_share(0, 2)) == pytest.approx(
        (-0.6576, 0.6576), abs=1e-4
    )


def test_intervals_of_pairs_and_ratios_cover_the_truth_in_about_95_of_100() -> None:
    rng = random.Random(0)
    pairs = ratios = 0
    for _ in range(1000):
        drawn = [rng.random() for _ in range(150)]
        wins, losses = sum(one < 0.10 for one in drawn), sum(0.10 <= one < 0.16 for one in drawn)
        low, high = bound_net_wins(wins, losses, 150 - wins - losses)
        pairs += low <= 0.04 <= high
        before, after = (sum(rng.random() < share for _ in range(150)) for share in (0.36, 0.12))
        low, high = bound_ratio(measure_share(before, 150), measure_share(after, 150))
        ratios += low <= 3.0 <= high

    assert 925 <= pairs <= 980
    assert 925 <= ratios <= 980


def test_the_difference_on_the_same_cases_covers_the_truth() -> None:
    """Both judges are right or wrong together more often than not, as two judges of the same pairs
    are; halves stand for ties."""
    rng = random.Random(2)
    outcomes = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.5), (0.0, 0.5)]
    shares = (0.45, 0.15, 0.08, 0.22, 0.06, 0.04)
    truth = sum(share * (ours - theirs) for share, (ours, theirs) in zip(shares, outcomes))
    for count in (40, 200):
        covered = 0
        for _ in range(1000):
            ours, theirs = zip(*rng.choices(outcomes, shares, k=count))
            difference = compare_marks(ours, theirs)
            covered += difference.low <= truth <= difference.high

        assert 930 <= covered <= 980


def test_cases_of_one_origin_count_together() -> None:
    """Eight answers to each question, which share half of what decides: the interval that takes
    them for independent is too narrow, the other is not."""
    rng = random.Random(3)
    covered = naive = 0
    for _ in range(400):
        gains, origins = [], []
        for question in range(60):
            easy = rng.choice((1.0, 0.0, 0.0))
            for _ in range(8):
                gains.append(easy if rng.random() < 0.7 else rng.choice((-1.0, 0.0, 0.0)))
                origins.append(question)

        truth = 0.7 / 3 - 0.3 / 3
        marks = [max(gain, 0.0) for gain in gains], [max(-gain, 0.0) for gain in gains]
        together, apart = compare_marks(*marks, origins), compare_marks(*marks)
        assert together.difference == apart.difference
        covered += together.low <= truth <= together.high
        naive += apart.low <= truth <= apart.high

    assert covered >= 0.92 * 400
    assert naive < 0.8 * 400


def test_the_difference_of_whole_marks_is_that_of_wins_and_losses() -> None:
    ours = [1.0] * 30 + [1.0] * 12 + [0.0] * 5 + [0.0] * 9
    theirs = [1.0] * 30 + [0.0] * 12 + [1.0] * 5 + [0.0] * 9
    difference = compare_marks(ours, theirs)
    assert (difference.low, difference.high) == pytest.approx(bound_net_wins(12, 5, 39))
    assert (difference.difference, difference.n) == (7 / 56, 56)
    # a judge beside itself, and one case
    assert compare_marks(ours, ours).difference == 0.0
    assert compare_marks([1.0], [0.0]).high <= 1.0


def test_nothing_of_nothing_says_nothing() -> None:
    assert bound_ratio(measure_share(0, 2), measure_share(0, 2)) == (0.0, math.inf)
    low, high = bound_ratio(measure_share(2, 2), measure_share(0, 2))
    assert low < 3
    assert high == math.inf
    assert bound_ratio(measure_share(0, 20), measure_share(5, 20))[0] == 0.0
    assert bound_ratio(measure_share(48, 150), measure_share(0, 150))[0] > 8
    low, high = bound_net_wins(0, 0, 2)
    assert low < -0.4
    assert high > 0.4


def test_intervals_of_nothing_and_of_all_have_exact_ends_whatever_the_count() -> None:
    for count in range(1, 500):
        assert bound_share(0, count)[0] == 0.0 < bound_share(0, count)[1] < 1.0
        assert 0.0 < bound_share(count, count)[0] < bound_share(count, count)[1] == 1.0
        none, some, every = (measure_share(hits, count) for hits in (0, (count + 1) // 2, count))
        low, high = bound_ratio(none, some)
        assert (low, 0.0 < high < math.inf) == (0.0, True)
        assert bound_ratio(none, none) == (0.0, math.inf)
        assert bound_ratio(every, none)[1] == math.inf
        low, high = bound_ratio(every, every)
        assert low < 1.0 < high


def test_win_rate_leaves_out_ties() -> None:
    outcome = compare([1.0, 0.5, 0.2, 0.9], [0.5, 0.5, 0.4, 0.1])
    assert (outcome.wins, outcome.losses, outcome.ties) == (2, 1, 1)
    assert outcome.rate == pytest.approx(2 / 3)
    assert compare([1.0], [1.0]).rate is None

    with pytest.raises(ValueError, match=r"shorter|longer"):
        compare([1.0], [1.0, 2.0])


def test_proportions_and_means_without_data_are_none() -> None:
    assert measure_share(0, 0).rate is None
    assert measure_mean([]).mean is None
    assert measure_mean([0.5]) == Mean(mean=0.5, n=1, low=0.5, high=0.5)
    one = measure_mean([0.0, 1.0] * 50)
    assert one.high - one.mean == pytest.approx(1.96 * 0.5 / 10, rel=0.01)


def test_correlation() -> None:
    assert correlate([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlate([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert correlate([1, 2], [5, 5]) is None


def test_kinds() -> None:
    assert classify(prompt("unsafe", True)) == "unsafe"
    assert classify(prompt("borderline", True)) == "borderline"
    assert classify(prompt("fact")) == "helpful"
    assert classify(prompt(None, True)) == "unsafe"
    assert classify(prompt(None)) == "helpful"


def test_truth_needs_gold_on_every_prompt() -> None:
    assert rate(GroundTruth(), [prompt("fact")], ["Hello."]) is None


class Strict:
    """A judge of prompts that nobody wrote for it."""

    def accepts(self, prompt: Prompt) -> bool:
        return prompt.id != "refused"

    def rate(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Rating]:
        return [Rating(0.5, answer != "bad", False) for answer in answers]


def test_any_judge_that_accepts_all_prompts_is_asked() -> None:
    asked = [prompt("fact"), prompt(None)]
    assert rate(Strict(), asked, ["ok", "bad"]) == [
        Rating(0.5, True, False),
        Rating(0.5, False, False),
    ]
    assert rate(Strict(), [*asked, prompt(None, id="refused")], ["ok", "bad", "ok"]) is None


def test_distribution_counts_everything_once() -> None:
    described = summary.distribute([0.0, 0.1, 0.5, 0.999, 1.0])
    assert sum(described.histogram.counts) == 5
    assert described.histogram.counts[-1] == 2
    assert described.quantiles["50"] == 0.5


@pytest.fixture
def two_versions() -> tuple[list[Prompt], dict[str, summary.Version]]:
    prompts = [
        prompt("fact", id="a"),
        prompt("list", id="b"),
        prompt("unsafe", True, "c"),
        prompt("borderline", True, "d"),
    ]
    before = summary.Version(
        [answer("x", 9, "length"), answer("y"), answer("bad"), answer("No.")],
        [
            Rating(0.4, True, False),
            Rating(0.6, True, False),
            Rating(0.0, False, False),
            Rating(0.0, True, True),
        ],
        rewards={"helpful": [0.2, 0.3, 0.4, 0.5], "safe": [0.9, 0.9, 0.1, 0.9]},
    )
    after = summary.Version(
        [answer("x2"), answer("y2"), answer("I cannot."), answer("ok")],
        [
            Rating(0.9, True, False),
            Rating(0.6, True, False),
            Rating(0.7, True, True),
            Rating(0.8, True, False),
        ],
        rewards={"helpful": [0.6, 0.2, 0.4, 0.5], "safe": [0.9, 0.9, 0.8, 0.9]},
    )

    return prompts, {"SFT": before, "V1": after}


def summarise(
    prompts: list[Prompt], versions: dict[str, summary.Version], conversations: int
) -> EvaluateResult:
    sampling = SamplingSettings(temperature=0.6, top_p=0.9, max_tokens=64)
    return evaluate.summarise(prompts, versions, conversations, {}, sampling)


def test_figures_of_versions(two_versions: tuple[list[Prompt], dict[str, summary.Version]]) -> None:
    described = summarise(*two_versions, conversations=3)
    first, last = described.results["SFT"], described.results["V1"]
    assert described.versions == ["SFT", "V1"]
    assert described.prompts == {"helpful": 2, "unsafe": 1, "borderline": 1}
    assert first.truth is not None
    assert last.truth is not None
    assert first.truth.helpfulness.mean == pytest.approx(0.5)
    assert first.truth.families["fact"].mean == pytest.approx(0.4)
    assert (first.truth.violations.rate, last.truth.violations.rate) == (1.0, 0.0)
    assert (first.truth.false_refusals.rate, last.truth.false_refusals.rate) == (
        1.0,
        0.0,
    )
    assert last.truth.refusal_quality.mean == pytest.approx(0.7)
    assert first.eos.rate == 0.75
    assert first.length.mean == pytest.approx(4.5)
    assert first.rewards["helpful"].mean == pytest.approx(0.25)  # on the two helpful prompts
    assert (first.rewards["safe"].mean, first.rewards["safe"].n) == (0.1, 1)
    assert first.rewards_by_kind["safe"]["borderline"].mean == 0.9
    assert first.reward_length_correlation["helpful"] == pytest.approx(-1.0)


def test_win_rates_by_axis_and_judge(
    two_versions: tuple[list[Prompt], dict[str, summary.Version]],
) -> None:
    described = summarise(*two_versions, conversations=0)
    rates = {(row.axis, row.judge): row for row in described.win_rates}
    assert len(described.win_rates) == len(rates) == 4
    assert (rates["helpful", "truth"].wins, rates["helpful", "truth"].ties) == (1, 1)
    assert (rates["helpful", "reward"].wins, rates["helpful", "reward"].losses) == (1, 1)
    assert rates["safe", "truth"].rate == rates["safe", "reward"].rate == 1.0


def test_third_version_is_compared_with_first_and_predecessor(
    two_versions: tuple[list[Prompt], dict[str, summary.Version]],
) -> None:
    prompts, versions = two_versions
    described = summarise(prompts, versions | {"V2": versions["V1"]}, conversations=0)
    pairs = {(row.version, row.against) for row in described.win_rates}
    assert pairs == {("V1", "SFT"), ("V2", "SFT"), ("V2", "V1")}
    tied = [row for row in described.win_rates if row.against == "V1"]
    assert all(row.rate is None for row in tied)


def test_conversations_cover_families_and_versions(
    two_versions: tuple[list[Prompt], dict[str, summary.Version]],
) -> None:
    described = summarise(*two_versions, conversations=3)
    assert [row.family for row in described.conversations] == ["borderline", "unsafe", "fact"]
    assert described.conversations[2].answers["V1"].model_dump() == {
        "text": "x2",
        "helpfulness": 0.9,
        "safe": True,
        "reward_helpful": 0.6,
        "reward_safe": 0.9,
    }
