"""Text that is certain: whole characters, no part of a stop string, no white space at the ends."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.serve.detokenizer import Detokenizer, StopScanner, TextDelta

LETTERS = st.text("abc", max_size=30)


def cut(text, places):
    """The text in parts."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def through(stops, parts):
    scanner = StopScanner(stops)
    said = [scanner.push(part) for part in parts]
    return said, scanner


@given(
    LETTERS,
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 99)),
)
def test_it_does_not_matter_how_a_text_is_cut(text, stops, places):
    whole, scanner = through(stops, list(text))
    said, other = through(stops, cut(text, places))
    assert scanner.found == other.found == any(stop in text for stop in stops)
    assert "".join(whole) + scanner.rest() == "".join(said) + other.rest()


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_certain_is_before_any_stop_string(text, stops):
    said, scanner = through(stops, list(text))
    answer = "".join(said) + scanner.rest()
    assert not any(stop in answer for stop in stops)
    assert text.startswith(answer)

    if scanner.found:
        assert any(text[len(answer) :].startswith(stop) for stop in stops)
    else:
        assert answer == text


def test_only_what_may_be_a_stop_string_waits():
    assert through(["###", "\n\n"], ["a#", "b##", "\n", "c", "\n\n", "d"])[0] == [
        "a",
        "#b",
        "##",
        "\nc",
        "",
        "",
    ]


@pytest.fixture(scope="module")
def decode(tokenizer):
    def run(text, stops=(), strip=True):
        detokenizer, whole = Detokenizer(tokenizer, stops, strip=strip), TextDelta()
        for place, token in enumerate(tokenizer.encode(text)):
            if detokenizer.stopped:
                break

            whole.add(detokenizer.push(token, -float(place)))

        whole.add(detokenizer.close())
        return whole

    return run


def test_white_space_at_the_ends_is_taken_off(decode):
    assert decode("  a  b \n ").text == "a  b"
    assert decode("  a  b \n ", strip=False).text == "  a  b \n "
    assert decode(" \n ").text == ""


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("x\U0001f600y")
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(token, 0.0).text for token in ids]
    assert "".join(parts) + detokenizer.close().text == "x\U0001f600y"
    assert all(len(part) <= 1 for part in parts)
    cut_off = Detokenizer(tokenizer)
    text = "".join(cut_off.push(token, 0.0).text for token in ids[:-2]) + cut_off.close().text
    assert text == "x\ufffd"


def test_tokens_are_reported_with_the_text_they_begin(decode, tokenizer):
    whole = decode("one two three", strip=False)
    assert [token.token for token in whole.tokens] == tokenizer.encode("one two three")
    assert [token.logprob for token in whole.tokens] == [
        -float(place) for place in range(len(whole.tokens))
    ]
    assert whole.tokens[0].offset == 0
    stopped = decode("one two three", stops=["two"], strip=False)
    assert stopped.text == "one "
    assert "one two".startswith(tokenizer.decode(token.token for token in stopped.tokens))
    assert [token.token for token in stopped.tokens] == tokenizer.encode("one two three")[
        : len(stopped.tokens)
    ]


def test_a_continuation_keeps_its_space(tokenizer):
    ids = tokenizer.encode("one two")
    first = len(tokenizer.encode("one"))
    detokenizer = Detokenizer(tokenizer, prompt=[tokenizer.bos, *ids[:first]])
    assert (
        "".join(detokenizer.push(token, 0.0).text for token in ids[first:])
        + detokenizer.close().text
        == " two"
    )


@pytest.mark.parametrize(
    ("begun", "rest"),
    [
        ("one", " two"),
        ("one ", "two"),
        ("one  ", "two"),
        ("  one", " two"),
        (" ", "one two"),
        ("", "one two"),
    ],
)
def test_the_rest_of_an_answer_goes_on_where_it_was_begun(tokenizer, begun, rest):
    """White space that the beginning ends with is not said again; the end is still stripped."""
    head = begun.strip()
    prompt = [tokenizer.bos, *(tokenizer.encode(head) if head else [])]
    whole = tokenizer.encode("one two ")
    detokenizer = Detokenizer(tokenizer, prompt=prompt, strip=True, begun=begun)
    said = (
        "".join(detokenizer.push(token, 0.0).text for token in whole[len(prompt) - 1 :])
        + detokenizer.close().text
    )
    assert said == rest


def test_every_token_of_a_stop_string_is_reported(tokenizer):
    for text, stop in (("one two three", "o thr"), ("one two three", "one"), ("ab😀c", "😀")):
        detokenizer, whole, pushed = Detokenizer(tokenizer, [stop]), TextDelta(), []
        for token in tokenizer.encode(text):
            pushed.append(token)
            whole.add(detokenizer.push(token, 0.0))
            if detokenizer.stopped:
                break

        assert whole.text == text[: text.index(stop)]
        assert [token.token for token in whole.tokens] == pushed
        assert not detokenizer.close()
