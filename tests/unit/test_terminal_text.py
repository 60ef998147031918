"""What others wrote never commands the terminal, and a message is one line that ends."""

import pytest

from llama2.errors import UserError
from llama2.terminal_text import (
    LONGEST,
    fit_line,
    format_clock,
    list_some,
    make_printable,
    say,
    say_once,
    show_value,
)

CLEAR, TITLE, RIGHT_TO_LEFT = "\x1b[2J", "\x1b]0;mine\x07", "\u202e"


def test_an_answer_keeps_its_lines_and_every_letter():
    text = "日本\u3000語\tné\u200c \U0001f468\u200d\U0001f469 \u00a0x\n"
    assert make_printable(text) == text
    assert (
        make_printable(f"a{CLEAR}b{RIGHT_TO_LEFT}c\x9bd\re\u2066\u2028")
        == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\ufffd\ufffd"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a{CLEAR}{TITLE}", r"a\x1b[2J\x1b]0;mine\x07"),
        (f"name{RIGHT_TO_LEFT}fdp.exe", r"name\u202efdp.exe"),
        ("two\nlines\r\n\tand \x85\u2028", r"two lines   and \x85\u2028"),
        ("half \ud800, byte \udcff", r"half \ud800, byte \udcff"),
        ("Mühle 磨坊 \u3000", "Mühle 磨坊 \u3000"),
    ],
)
def test_a_message_is_one_line_that_spells_what_is_not_drawn(text, expected):
    assert fit_line(text) == expected


def test_a_long_message_keeps_both_ends():
    found = fit_line("begin" + "x" * 100_000 + "end")
    assert len(found) == LONGEST
    assert found.startswith("beginxxx")
    assert found.endswith("xxxend")


def test_a_message_of_what_must_be_spelt_is_no_longer_for_it():
    found = fit_line("begin" + "\x1b" * 100_000 + "end")
    assert len(found) == LONGEST
    assert found.startswith(r"begin\x1b\x1b")
    assert found.endswith(r"\x1b\x1bend")


def test_values_are_shown_as_far_as_they_can_be():
    assert show_value([1, 2]) == "[1, 2]"
    assert show_value("\x1b[2J\u202e") == r"'\x1b[2J\u202e'"
    assert show_value(list(range(1000))) == "[" + ", ".join(map(str, range(1000)))[:96] + "..."
    deep: list[object] = []

    for _ in range(100_000):
        deep = [deep]

    assert show_value(deep) == "a list too large to show"
    while deep:  # Python would free it level by level
        deep = deep.pop()

    assert show_value(10**5000) == "a int too large to show"


def test_errors_are_fit_for_a_terminal():
    error = UserError(
        f"m/{TITLE}: tensor '{CLEAR}{'y' * 5000}' is wrong", f"fetch {RIGHT_TO_LEFT}it\nagain"
    )
    assert error.cure == r"fetch \u202eit again"
    assert str(error).isprintable()
    assert str(error).startswith(r"m/\x1b]0;mine\x07: tensor '\x1b[2Jyyy")
    assert str(error).endswith(r"yyy' is wrong; fetch \u202eit again")
    assert len(str(UserError("\x1b" * 5000, "\x1b" * 5000))) < LONGEST - len("llama2: error: ")


def test_what_is_said_is_one_line(capsys):
    say(f"warning: {CLEAR}\nx")
    assert capsys.readouterr().err == "warning: \\x1b[2J x\n"


def test_a_duration_is_written_as_a_clock_writes_it():
    assert [format_clock(seconds) for seconds in (0, 59.9, 200, 3800)] == [
        "0:00",
        "0:59",
        "3:20",
        "1:03:20",
    ]


def test_of_many_names_the_first_are_listed() -> None:
    assert list_some([]) == ""
    assert list_some(["a", "b"], 2) == "a, b"
    assert list_some(["a", "b", "c"], 2) == "a, b, ..."


def test_a_line_is_said_once_and_by_the_first_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say_once("note: one of a kind")
    say_once("note: one of a kind")
    assert capsys.readouterr().err == "llama2: note: one of a kind\n"
    monkeypatch.setenv("RANK", "1")
    say_once("note: of another rank")
    assert capsys.readouterr().err == ""
