"""Switches in the environment."""

import pytest

from llama2 import environment
from llama2.errors import UserError


@pytest.mark.parametrize(
    ("said", "means"),
    [
        (None, True),
        ("", True),
        ("1", True),
        ("true", True),
        ("ON", True),
        (" yes ", True),
        ("0", False),
        ("false", False),
        ("False", False),
        ("off", False),
        ("no", False),
    ],
)
def test_a_switch_means_what_it_says(monkeypatch, said, means):
    monkeypatch.delenv("LLAMA2_NATIVE", raising=False)
    if said is not None:
        monkeypatch.setenv("LLAMA2_NATIVE", said)

    assert environment.wants_native() is means
    assert environment.is_on("LLAMA2_NATIVE", default=False) is (means and bool(said))


@pytest.mark.parametrize("said", ["2", "nein", "-", "falsch"])
def test_nonsense_is_refused(monkeypatch, said):
    monkeypatch.setenv("LLAMA2_NATIVE", said)
    with pytest.raises(
        UserError, match=f"LLAMA2_NATIVE={said}: it says neither yes nor no; set it to 1 or 0"
    ):
        environment.wants_native()
