"""The mixture: shares of tokens, whole passes, determinism."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.data.mix import Mixture, mix, mix_passes
from llama2.errors import UserError


def lengths(**sizes: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(size, dtype=np.int64) for name, size in sizes.items()}


def drawn(mixture: Mixture, name: str) -> list[int]:
    return mixture.document_N[mixture.source_N == mixture.names.index(name)].tolist()


SIZES = st.lists(st.integers(2, 50), min_size=1, max_size=8)


@given(
    a=SIZES, b=SIZES, weight=st.floats(0.01, 1), tokens=st.integers(1, 3000), seed=st.integers(0, 9)
)
def test_shares_passes_and_permutations(
    a: list[int], b: list[int], weight: float, tokens: int, seed: int
) -> None:
    sizes = lengths(a=a, b=b)
    mixture = mix(sizes, {"a": weight, "b": 1.0}, tokens, seed)
    given_by = {
        name: sum(int(sizes[name][number]) for number in drawn(mixture, name)) for name in sizes
    }
    total = sum(given_by.values())
    assert tokens <= total < tokens + max(a + b)
    share = weight / (1 + weight)
    assert abs(given_by["a"] - share * total) <= max(a + b)

    for name, size in sizes.items():
        order = drawn(mixture, name)
        for start in range(0, len(order), len(size)):
            part = order[start : start + len(size)]
            assert len(set(part)) == len(part)

        assert mixture.passes[name] == pytest.approx(given_by[name] / sum(size))

    assert sum(mixture.shares.values()) == pytest.approx(1)


@given(a=SIZES, b=SIZES, passes=st.tuples(st.integers(0, 3), st.integers(1, 3)))
def test_whole_passes_are_exact(a: list[int], b: list[int], passes: tuple[int, int]) -> None:
    mixture = mix_passes(lengths(a=a, b=b), {"a": passes[0], "b": passes[1]}, seed=1)
    assert mixture.passes == {"a": passes[0], "b": passes[1]}
    for name, size, count in (("a", a, passes[0]), ("b", b, passes[1])):
        assert Counter(drawn(mixture, name)) == Counter(list(range(len(size))) * count)


def test_shares_hold_everywhere_in_the_stream() -> None:
    mixture = mix(lengths(a=[10] * 30, b=[10] * 5), {"a": 3, "b": 1}, 4000, seed=0)
    for end in range(40, 400, 40):
        assert int((mixture.source_N[:end] == 1).sum()) == pytest.approx(end / 4, abs=1)


def test_the_seed_decides_the_order() -> None:
    sizes = lengths(a=list(range(2, 40)), b=[5] * 30)
    orders = [mix(sizes, {"a": 1, "b": 2}, 2000, seed).document_N.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("sizes", "weights", "cause"),
    [
        ({"a": [3]}, {"b": 1.0}, "the sources are a, but weights are given for b"),
        ({"a": []}, {"a": 1.0}, "holds no tokens"),
        ({"a": [3]}, {"a": -1.0}, "weight of the source 'a' is -1.0"),
        ({"a": [3]}, {"a": float("nan")}, "weight of the source"),
        ({"a": [3]}, {"a": 0.0}, "all sources have weight 0"),
    ],
)
def test_errors(sizes: dict[str, list[int]], weights: dict[str, float], cause: str) -> None:
    for draw in (
        lambda: mix(lengths(**sizes), weights, 10, 0),
        lambda: mix_passes(lengths(**sizes), weights, 0),
    ):
        with pytest.raises(UserError, match=cause):
            draw()
