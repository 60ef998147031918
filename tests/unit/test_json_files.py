"""Files that are read whole: what stands in their place, and JSON that is damaged or made to
harm."""

import os
import socket

import pytest

from llama2 import json_files
from llama2.errors import UserError


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ('{"a": 1, "a": 1}', {"a": 1}),
        ('{"a": 1000000000000000019884624838656}', {"a": 1e30}),
        ('{"a": 18446744073709551615}', {"a": 2**64 - 1}),
        ('{"a": %s}' % ("9" * 5000), {"a": float("inf")}),
        ('{"a": Infinity}', {"a": float("inf")}),
    ],
)
def test_objects_are_read(tmp_path, content, value):
    (tmp_path / "x.json").write_text(content, "utf-8")
    assert json_files.read_object(tmp_path / "x.json") == value


def test_utf_16_behind_its_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes('{"ü": 1}'.encode("utf-16"))
    assert json_files.read_object(tmp_path / "x.json") == {"ü": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "x.json: the file is empty, JSON was expected; run it again"),
        (b" \n", "x.json: the file is empty, JSON was expected; run it again"),
        (
            b'{"a":\n 1',
            "x.json:2: not valid JSON (Expecting ',' delimiter at column 3); run it again",
        ),
        (b'{"a": 1} {"b": 2}', "x.json:1: not valid JSON (Extra data at column 10); run it again"),
        (b"\0" * 40, "x.json:1: not valid JSON (Expecting value at column 1); run it again"),
        (
            b'{"\xff": 1}',
            "x.json: not valid JSON (no text in utf-8: invalid start byte at byte 2); run it again",
        ),
        (b"[1]", "x.json: a JSON object was expected, this is a list; run it again"),
        (b"null", "x.json: a JSON object was expected, this is null; run it again"),
        (b"3", "x.json: a JSON object was expected, this is 3; run it again"),
        (
            b'{"r": 1, "r": 2}',
            "x.json: not valid JSON (the key 'r' stands twice, with two values); run it again",
        ),
        (
            b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}",
            "x.json: not valid JSON (nested more than 100 levels deep); run it again",
        ),
        (b'{"a":' * 200_000, "x.json: not valid JSON (nested too deeply); run it again"),
    ],
)
def test_other_json_is_one_line(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        json_files.read_object(tmp_path / "x.json", "run it again")

    assert str(error.value) == f"{tmp_path}/{words}"


def test_a_list_is_no_object(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(
        UserError, match="a JSON list was expected, this is an object; fetch it again"
    ):
        json_files.read_list(tmp_path / "x.json")


def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # the place of one may have 108 bytes

    for name, kind in (
        ("pipe", "a pipe"),
        ("zero", "a device"),
        ("socket", "a socket"),
        (".", "a directory"),
    ):
        with pytest.raises(UserError, match=f"this is {kind}, a file was expected"):
            json_files.read_bytes(tmp_path / name)

    for name, words in (
        ("circle", "symbolic links that lead in a circle"),
        ("none", "no such file or directory"),
        ("a" * 300, "this name is too long for the file system"),
    ):
        with pytest.raises(UserError, match=words):
            json_files.open_file(tmp_path / name)


def test_a_file_may_be_too_large_to_be_what_it_should_be(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(json_files.LARGEST + 1)

    with pytest.raises(
        UserError, match=r"x\.json: 1,073,741,825 bytes, at most 1,073,741,824 were expected"
    ):
        json_files.read_object(tmp_path / "x.json")


def test_names_of_a_directory_of_its_own():
    names = ["a.bin", "..", "../a", "/dev/zero", "a/b", "", ".", "a\0b", "a/", 3, None]
    assert [name for name in names if json_files.is_file_name(name)] == ["a.bin"]
