"""Counts of what a stage read, as one line."""

from llama2.tally import Tally


def test_the_line_says_rows_and_files():
    tally = Tally(read=1005, kept=2, cut=1)
    assert tally.line() == "read 1,005, kept 2, cut 1"
    tally.skip("too long", "raise --sequence-length", 3)
    tally.skip("empty answer")
    assert tally.line() == (
        "read 1,005, kept 2, cut 1, left out 4: too long 3 (raise --sequence-length), "
        "empty answer 1"
    )
    tally.leave("hidden", 2)
    tally.leave("README.md")
    assert tally.line().endswith("empty answer 1; files left out 3: hidden 2, README.md 1")
    assert tally.summary() == {
        "read": 1005,
        "kept": 2,
        "cut": 1,
        "skipped": {"too long": 3, "empty answer": 1},
        "files_left_out": {"hidden": 2, "README.md": 1},
    }
