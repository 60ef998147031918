"""Messages of one line and of many, and the file that remembers them."""

import stat
from pathlib import Path

import pytest

from llama2.chat import keyboard
from llama2.chat.keyboard import History, read_message, remember
from llama2.errors import UserError


def typed(*lines: str) -> keyboard.LineReader:
    waiting = list(lines)
    return lambda prompt, draft="": waiting.pop(0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", "  two", 'three"""'], "one\n\n  two\nthree"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['say """this"""'], 'say """this"""'),
    ],
)
def test_a_message_may_have_many_lines(lines: list[str], expected: str) -> None:
    assert read_message(typed(*lines)) == expected


def test_history_is_private_bounded_and_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = History(History.default())
    assert history.path == tmp_path / "llama2" / "history"
    assert history.read() == []
    history.path.parent.mkdir()
    history.path.write_text('not JSON\n5\n"old"\n')
    history.path.chmod(0o644)
    history.add("one\ntwo")
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert history.read() == ["old", "one\ntwo"]
    history.path.write_text('"x"\n' * 2500)
    assert len(history.read()) == keyboard.MOST_MESSAGES
    assert len(history.path.read_text().splitlines()) == keyboard.MOST_MESSAGES
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600


def test_a_relative_state_directory_is_no_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    assert History.default() == Path.home() / ".local" / "state" / "llama2" / "history"


def test_a_user_without_a_home_directory_has_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(UserError, match=r"^this user has no home directory; set XDG_STATE_HOME$"):
        History.default()


def test_a_history_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history")
    with pytest.raises(UserError):
        history.add("one")

    assert remember(remember(history, "one"), "two") is None
    assert capsys.readouterr().err.count("not remembered") == 1
