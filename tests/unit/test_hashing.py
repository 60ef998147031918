"""Numbers that seeds and splits are made of are the same for ever."""

import hashlib

import pytest

from llama2.errors import UserError
from llama2.hashing import hash_content, hash_file, hash_fraction, hash_number, hash_parts


def test_a_file_has_the_hash_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert hash_file(tmp_path / "a") == hash_content(b"abc") == hash_content("abc") == expected
    with pytest.raises(UserError, match="this is a directory"):
        hash_file(tmp_path)


def test_numbers_of_a_text_do_not_change_between_versions():
    assert hash_number("a text") == 5830437876521264211
    assert hash_number("a text", 4, "big") == 1841655829
    assert hash_fraction("a text") == 5830437876521264211 / 2**64
    assert hash_parts("heldout", "a text") == 12723624998705764492


def test_half_of_a_surrogate_pair_has_a_hash_too():
    assert hash_content("\ud800") != hash_content("\ud801")
    assert hash_number("\ud800") != hash_number("\ud801")
