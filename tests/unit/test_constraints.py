"""What a program can check of an instruction in the text of an answer."""

from __future__ import annotations

import pytest

from llama2.errors import UserError
from llama2.evaluate.constraints import Check, obeys_all, read_checks

CASES = [
    ("language", "French", "Je suis ravi de vous aider avec cette question.", "I am glad to help."),
    ("starts", "Ahoy!", "Ahoy, my friend: it rains.", "It rains. Ahoy!"),
    ("starts", "Marie Curie here.", "Marie Curie here. It glows.", "Here Marie Curie. It glows."),
    ("ends", "Over and out.", "It rains.\n\nOver and out!", "Over and out. It rains."),
    ("mentions", "chess", "I would rather play chess.", "I would rather play."),
    ("mentions", "tennis|racket", "Two rackets lie there.", "The bracket is open."),
    ("upper case", "", "IT RAINS 3 DAYS, SAYS DR.", "It Rains"),
    ("lower case", "", "it rains 3 days.", "It rains 3 days."),
    ("emoji", "", "It rains \U0001f327", "It rains :-)"),
    ("pirate", "", "Arrr, it be raining, matey.", "It rains on the harbour, pal."),
    ("three lines", "", "An old silent pond\na frog jumps\nsplash", "An old pond; a frog; splash"),
    ("at most", "5", "It rains in the north.", "It rains in the whole north."),
    ("list", "", "Take:\n- salt\n- flour\n- water", "Take salt, flour and water."),
]


@pytest.mark.parametrize(("name", "argument", "good", "bad"), CASES)
def test_checks(name: str, argument: str, good: str, bad: str) -> None:
    check = Check(name, argument)
    assert check.passes(good)
    assert not check.passes(bad)
    assert not check.passes("")
    assert read_checks([[name, argument]], "x") == (check,)


def test_every_check_must_pass_and_the_answer_must_be_one() -> None:
    checks = (Check("starts", "Ahoy!"), Check("upper case"))
    assert obeys_all(checks, "Why?", "AHOY! IT RAINS.")
    assert not obeys_all(checks, "Why?", "Ahoy! It rains.")
    assert not obeys_all(checks, "Why?", "AHOY! " * 12)
    assert not obeys_all((), "Why?", "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["langage", "French"]], r"there is no check 'langage'; did you mean 'language'\?"),
        ([["language", "Klingon"]], "the language 'Klingon' cannot be told; languages: English"),
        ([["at most", "ten"]], "'at most' needs a number of words"),
        ([["starts", 3]], "is no list of"),
        ([[]], "is no list of"),
        ("language", "is no list of"),
        ([{"language": "French"}], "is no list of"),
    ],
)
def test_what_cannot_be_checked_is_named(rows: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_checks(rows, "file: prompt 'p'")
