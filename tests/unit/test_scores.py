"""Scores beside two answers: ties and contradictions teach nothing."""

import pytest
from strangers import comparisons, turns, write

from llama2.errors import UserError
from llama2.importers.preferences import import_preferences
from llama2.tally import Tally

PAIR = {"prompt": "p", "chosen": turns("p", "x"), "rejected": turns("p", "y")}
KEPT = [(("p",), "x", "y", "better")]
SPELLINGS = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("reward_chosen", "reward_rejected"),
]
LAYOUTS = [
    PAIR,
    {"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: p\n\nAssistant: y"},
    {"conversations": turns("p"), "chosen": turns("", "x")[1], "rejected": turns("", "y")[1]},
]


@pytest.mark.parametrize(("better", "worse"), SPELLINGS)
@pytest.mark.parametrize("pair", LAYOUTS)
def test_ties_and_contradictions_are_counted_in_every_layout(tmp_path, pair, better, worse):
    rows = [
        pair | {better: a, worse: b}
        for a, b in ((8.0, 7.0), (7.0, 7.0), (1.0, 9.0), ("8", "7.5"), (None, None))
    ]
    read, tally = comparisons(tmp_path, *rows)
    assert read == KEPT * 3
    assert dict(tally.skipped) == {"tie": 1, "the scores contradict the choice": 1}
    assert "columns not read" not in tally.notes


@pytest.mark.parametrize(
    ("margin", "skipped"),
    [(2.5, {}), (0, {"tie": 1}), (-1, {"the scores contradict the choice": 1})],
)
def test_a_margin_says_the_same(tmp_path, margin, skipped):
    read, tally = comparisons(tmp_path, PAIR | {"margin": margin})
    assert (read, dict(tally.skipped)) == ([] if skipped else KEPT, skipped)


@pytest.mark.parametrize(
    "row",
    [{"chosen_score": 3}, {"score_chosen": [1, 2], "score_rejected": [1]}, {"rating": [4, 2]}],
)
def test_scores_that_compare_nothing_are_refused_by_name(tmp_path, row):
    with pytest.raises(UserError, match="would be lost"):
        comparisons(tmp_path, PAIR | row)


def test_the_weight_of_a_comparison_is_all_or_nothing(tmp_path):
    read, tally = comparisons(tmp_path, PAIR | {"weight": 1.0}, PAIR | {"weight": 0})
    assert (read, dict(tally.skipped)) == (KEPT, {"not to be learnt": 1})
    for row, cause in (
        ({"weight": 0.5}, "'weight' is 0.5"),
        ({"loss_mask": [1, 0]}, "a comparison has no turns"),
    ):
        with pytest.raises(UserError, match=f"rows.jsonl:1: {cause}"):
            comparisons(tmp_path, PAIR | row)


def test_ultrafeedback_and_argilla(tmp_path):
    binarized = PAIR | {
        "prompt_id": "7",
        "messages": turns("p", "x"),
        "score_chosen": 8.0,
        "score_rejected": 7.5,
    }
    argilla = PAIR | {
        "source": "s",
        "chosen-rating": 5.0,
        "chosen-model": "m",
        "rejected-rating": 3,
        "rejected-model": "n",
    }
    for row in (binarized, argilla):
        assert comparisons(tmp_path, row)[0] == KEPT


def test_helpsteer_states_how_much_better_an_answer_is(tmp_path):
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_statement": "x"}
    rows = [row | {"preference_strength": strength} for strength in (-3, -2, -1, 0, 1, 2.0, "3")]
    read, tally = comparisons(tmp_path, *rows)
    assert [(chosen, degree) for _, chosen, _, degree in read] == [
        ("a", "significantly"),
        ("a", "better"),
        ("a", "slightly"),
        ("b", "slightly"),
        ("b", "better"),
        ("b", "significantly"),
    ]
    assert dict(tally.skipped) == {"tie": 1}

    with pytest.raises(
        UserError, match="'preference_strength' must be a whole number from -3 to 3, it is '4'"
    ):
        comparisons(tmp_path, row | {"preference_strength": 4})


@pytest.mark.parametrize(
    ("place", "axis"),
    [
        ("harmless-base/test.jsonl", "safe"),
        ("harmless-base.jsonl", "safe"),
        ("harmless/pairs.jsonl", "safe"),
        ("hh-rlhf-harmless-base/train.jsonl", "safe"),
        ("harmless_base_train.jsonl", "safe"),
        ("harmless-proj/data/helpful.jsonl", "helpful"),
        ("harmless-proj/helpful.jsonl", "helpful"),
        ("harmless-base/copies/helpful.jsonl", "helpful"),
        ("unharmless/a.jsonl", "helpful"),
        ("helpful-base/test.jsonl", "helpful"),
    ],
)
def test_the_axis_follows_from_the_names_of_anthropics_sets(tmp_path, place, axis):
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, {"prompt": "p", "chosen": "a", "rejected": "b"})
    tally = Tally()
    assert [p.axis for p in import_preferences(file, tally=tally)] == [axis]
    assert dict(tally.notes["axis"]) == {axis: 1}
