"""Lasting instructions that a program can check, and conversations made of any questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from answers import prompt

from llama2 import records
from llama2.evaluate.constraints import obeys_all, read_checks
from llama2.stages.common import instructions
from llama2.stages.common.instructions import KINDS, compose, compose_dialogs
from llama2.tally import Tally

OBEDIENT = {
    "language": {
        "French": "Il est dans la maison et il ne veut pas en sortir.",
        "Spanish": "Está en la casa y no quiere salir de ella.",
        "German": "Er ist in dem Haus und will nicht aus dem Haus.",
        "Italian": "È nella casa e non vuole che si esca di lì con lui.",
        "Portuguese": "Ele está na casa e não quer sair da casa com você.",
        "Dutch": "Hij is in het huis en wil niet naar buiten.",
    },
    "upper case": "IT RAINS.",
    "lower case": "it rains.",
    "emoji": "It rains \u2602.",
    "pirate": "Ahoy, it rains.",
    "at most": "It rains.",
}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    records.write(tmp_path / "q.jsonl", [prompt(f"Question {number}?") for number in range(400)])
    return tmp_path / "q.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_of_a_kind_can_be_obeyed_and_stored(kind: instructions.Kind) -> None:
    generator = np.random.default_rng(0)
    drawn = {instructions._make(kind, generator) for _ in range(120)}
    assert len(drawn) == len({each.text for each in drawn})
    for instruction in drawn:
        (check,) = instruction.checks
        answer = OBEDIENT.get(check.name, f"{check.argument} It rains. {check.argument}")
        if isinstance(answer, dict):
            answer = answer[check.argument]

        assert obeys_all(instruction.checks, "Why?", answer), instruction
        assert not obeys_all(instruction.checks, "Why?", "the quick Brown fox " * 3 + "x.")
        assert read_checks([[check.name, check.argument]], "x") == instruction.checks
        assert instruction.kind == kind
        assert len(instruction.short) < len(instruction.text)


def test_conversations_have_questions_of_their_own_and_some_two_instructions(
    questions: Path,
) -> None:
    tally = Tally()
    made = compose(questions, 10, ("greeting", "case", "emoji"), 0, tally)
    assert len(made) == 40
    asked = [question for each in made for question in each.questions]
    assert len(set(asked)) == len(asked) == 400 == tally.kept
    kinds = Counter(len(each.checks) for each in made)
    assert kinds[1] > kinds[2] > 0
    assert all(each.kind.count("+") == len(each.checks) - 1 for each in made)
    assert made == compose(questions, 10, ("greeting", "case", "emoji"), 0, Tally())
    assert made != compose(questions, 10, ("greeting", "case", "emoji"), 1, Tally())


def test_the_papers_words_have_no_checks(questions: Path) -> None:
    made = compose(questions, 4, None, 0, Tally())
    assert {each.checks for each in made} == {()}
    assert {word for each in made for word in each.kind.split("+")} == {
        "hobby",
        "language",
        "figure",
    }


def test_contrary_kinds_are_never_joined(questions: Path) -> None:
    for each in compose(questions, 2, KINDS, 3, Tally()):
        parts = set(each.kind.split("+"))
        assert not any(contrary <= parts for contrary in instructions._CONTRARY)


def test_dialogs_to_be_held_carry_the_same(questions: Path) -> None:
    made = compose(questions, 10, KINDS, 0, Tally())
    dialogs = compose_dialogs(questions, 10, KINDS, 0, 7, Tally())
    assert [dialog.instruction for dialog in dialogs] == [each.text for each in made[:7]]
    assert all(dialog.checks and dialog.markers == () for dialog in dialogs)
