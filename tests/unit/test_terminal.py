"""The terminal chat, with a model that says what it was told to say."""

import importlib.util
import io
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llama2 import records
from llama2.chat import terminal
from llama2.chat.screen import make_display
from llama2.chat.session import ChatSession
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Dialog, Messages
from llama2.serve import models
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train


class Parrot:
    """Answers "you said ..." and remembers what it was asked; "long" does not fit, "stop" is
    interrupted."""

    def __init__(self) -> None:
        self.asked: list[tuple[Messages, Sampling]] = []

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        self.asked.append((messages, sampling))
        text = messages[-1].content
        if text == "long":
            raise UserError("the prompt has 70 tokens, 6 more than fit", "shorten it")
        if text == "never":
            raise KeyboardInterrupt

        yield "you said"
        if text == "stop":
            raise KeyboardInterrupt

        yield f" {text}"

    def has_room(self, messages: Messages, room: int) -> bool:
        return messages[-1].content != "long"


def talk(
    lines: str, system: str = "", model: Parrot | None = None, **pipe: bool
) -> tuple[str, Parrot]:
    """What is said on a pipe whose commands are obeyed, and the model that heard it."""
    model, sink = model or Parrot(), io.StringIO()
    terminal.chat(
        model,
        Sampling(seed=5),
        system,
        source=io.StringIO(lines),
        sink=sink,  # type: ignore[arg-type]
        **{"commands": True, **pipe},
    )
    return sink.getvalue(), model


def contents(messages: Messages) -> list[str]:
    return [message.content for message in messages]


def test_a_pipe_gets_one_answer_a_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    answers, _ = talk("one\n\n  two \n/help\nthree")
    assert answers == "you said one\nyou said two\nyou said three\n"
    heard = capsys.readouterr()
    assert heard.out == ""
    assert "/save FILE" in heard.err


def test_commands_between_lines_that_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    _, model = talk(f"one\n/retry\n/save {file}\ntwo\n/save {file}\n", each_line=True)
    assert [contents(messages) for messages, _ in model.asked] == [["one"], ["one"], ["two"]]
    assert [contents(dialog.messages) for dialog in records.read(Dialog, file)] == [
        ["one", "you said one"],
        ["two", "you said two"],
    ]


def test_lines_of_a_pipe_are_text_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"/save {tmp_path}/file", "/load x", "/quit", "/system Be rude.", "/retry", "/rest"]
    answers, model = talk("\n".join(lines), commands=False)
    assert answers == "".join(f"you said {line}\n" for line in lines)
    assert [contents(asked)[-1] for asked, _ in model.asked] == lines
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_each_line_is_answered_as_if_it_were_alone() -> None:
    _, model = talk("one\ntwo\none\n", system="S", each_line=True)
    assert [contents(asked) for asked, _ in model.asked] == [
        ["S", "one"],
        ["S", "two"],
        ["S", "one"],
    ]
    assert [sampling.seed for _, sampling in model.asked] == [5, 5, 5]


def test_history_grows_and_each_question_has_its_seed() -> None:
    _, model = talk("one\ntwo\n")
    assert contents(model.asked[1][0]) == ["one", "you said one", "two"]
    assert [sampling.seed for _, sampling in model.asked] == [5, 6]


def test_system_and_reset() -> None:
    _, model = talk("one\n/system Be brief.\ntwo\n/reset\nthree\n/system\nfour\n", system="Hello")
    assert contents(model.asked[0][0]) == ["Hello", "one"]
    assert contents(model.asked[1][0]) == ["Be brief.", "one", "you said one", "two"]
    assert contents(model.asked[2][0]) == ["Be brief.", "three"]
    assert contents(model.asked[3][0]) == ["three", "you said three", "four"]


def test_save_adds_a_dialog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.jsonl"
    talk(f"/save {file}\none\n/save\n/save {file}\n", system="S")
    assert "no conversation" in capsys.readouterr().err
    talk(f"two\n/save {file}\n")
    assert [contents(dialog.messages) for dialog in records.read(Dialog, file)] == [
        ["S", "one", "you said one"],
        ["two", "you said two"],
    ]
    file.write_text("not a record\n")
    assert talk(f"two\n/save {file}\nthree\n")[0].endswith("you said three\n")
    assert file.read_text() == "not a record\n"
    assert "talk.jsonl:1" in capsys.readouterr().err


def test_unknown_commands_are_named_and_paths_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    answers, _ = talk("/rest\n/etc/passwd is what?\n")
    assert answers == "you said /etc/passwd is what?\n"
    assert "did you mean '/reset'?" in capsys.readouterr().err


def test_a_conversation_beyond_the_context_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    answers, model = talk("one\nlong\ntwo\n")
    assert answers == "you said one\nyou said two\n"
    assert contents(model.asked[2][0]) == ["one", "you said one", "two"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "6 more than fit" in line
    assert "/reset" in line


def test_an_interrupted_answer_is_kept_and_an_empty_one_is_not() -> None:
    model, sink = Parrot(), io.StringIO()
    session = ChatSession(model, Sampling(), "", make_display(sink, plain=True))  # type: ignore[arg-type]
    session.interactive = True

    for line in ("stop", "never", "two"):
        session.take(line)

    assert sink.getvalue() == "you said\nyou said two\n"
    assert contents(model.asked[2][0]) == ["stop", "you said", "two"]


@pytest.mark.parametrize("word", ["stop", "never"])
@pytest.mark.parametrize("each_line", [False, True])
def test_an_interruption_ends_a_pipe(word: str, each_line: bool) -> None:
    model = Parrot()
    with pytest.raises(KeyboardInterrupt):
        talk(f"one\n{word}\ntwo\n", model=model, each_line=each_line)

    assert [messages[-1].content for messages, _ in model.asked] == ["one", word]


def test_quit_ends_a_pipe() -> None:
    assert talk("one\n/quit\ntwo\n")[0] == "you said one\n"


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    assert talk("\x1b[2J\n")[0] == "you said \ufffd[2J\n"


def test_at_a_terminal_ctrl_c_keeps_the_session_and_ctrl_d_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed: list[Any] = ["one", KeyboardInterrupt(), "two", EOFError()]

    def ask(prompt: str) -> str:
        event = typed.pop(0)
        if isinstance(event, BaseException):
            raise event

        return str(event)

    monkeypatch.setattr("builtins.input", ask)
    sink = io.StringIO()
    terminal.chat(Parrot(), Sampling(), source=Screen(), sink=sink)  # type: ignore[arg-type]
    assert sink.getvalue() == "you said one\nyou said two\n"
    assert typed == []


def test_retry_and_edit_replace_the_last_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    _, model = talk("/retry\n/edit x\none\n/retry\ntwo\n/edit three\n/edit\nfour\n/reset\n/retry\n")
    assert [contents(asked) for asked, _ in model.asked] == [
        ["one"],
        ["one"],
        ["one", "you said one", "two"],
        ["one", "you said one", "three"],
        ["one", "you said one", "three", "you said three", "four"],
    ]
    assert [sampling.seed for _, sampling in model.asked] == [5, 6, 7, 8, 9]
    complaints = capsys.readouterr().err
    assert complaints.count("nothing has been said yet") == 3
    assert complaints.count("/edit needs the new text") == 1


def test_retry_after_a_refusal_asks_what_was_refused() -> None:
    _, model = talk("one\nlong\n/retry\n/edit two\n")
    assert [contents(asked)[-1] for asked, _ in model.asked] == ["one", "long", "long", "two"]
    assert contents(model.asked[-1][0]) == ["one", "you said one", "two"]


def test_load_goes_on_with_a_saved_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.jsonl"
    talk(f"one\n/save {file}\n")
    talk(f"two\n/save {file}\n", system="S")
    _, model = talk(
        f"zero\n/load {file}\nthree\n/load {file}\n/retry\n/load {tmp_path}/none\n/load\n"
    )
    assert contents(model.asked[1][0]) == ["S", "two", "you said two", "three"]
    assert contents(model.asked[2][0]) == ["S", "two"]
    complaints = capsys.readouterr().err
    assert "no such file" in complaints
    assert "/load needs the name" in complaints


class Conversation:
    """`at_a_terminal.py` at a pseudo-terminal: what is typed goes in, what appears is waited
    for."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._asked, self._seen = directory / "asked.jsonl", ""
        self._screen, inner = os.openpty()
        script = Path(__file__).with_name("at_a_terminal.py")
        root = Path(terminal.__file__).parents[2]
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "XDG_STATE_HOME": str(directory),
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "COLUMNS": "80",
            "LINES": "24",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self._asked), *options],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env=environment,
        )
        os.close(inner)

    def type(self, text: str, *then: str) -> None:
        """Type, and wait for what appears then, one after the other."""
        os.write(self._screen, text.encode())
        for each in then:
            self.sees(each)

    def sees(self, text: str) -> None:
        """Wait until `text` appears behind everything that was waited for before."""
        end = time.monotonic() + 100  # only what fails waits so long; machines may be busy
        while text not in self._seen:
            assert time.monotonic() < end, self._seen
            if select.select([self._screen], [], [], 0.1)[0]:
                part = os.read(self._screen, 4096).decode(errors="replace")
                self._seen += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", part)

        self._seen = self._seen.partition(text)[2]

    def __enter__(self) -> "Conversation":
        try:
            self.sees(">")
        except BaseException:
            self.__exit__()
            raise

        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._screen)
        self.process.kill()
        self.process.wait()

    def leave(self) -> list[list[str]]:
        self.type("\x04", "left asked.jsonl")
        assert self.process.wait(100) == 0
        return [json.loads(line) for line in self._asked.read_text().splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_at_a_terminal_lines_are_joined_answers_interrupted_and_messages_remembered(
    tmp_path: Path,
) -> None:
    with Conversation(tmp_path, "plain") as conversation:
        conversation.type("one\\\r", ". ")
        conversation.type("two\r", "heard 1", "complete", ">")
        conversation.type("slow\r", "word word")
        conversation.type("\x03", "interrupted", "complete", ">")
        conversation.type("/edit\r", "edit", "slow")
        conversation.type("er\r", "heard 3", "complete", ">")
        first, second, third = conversation.leave()

    assert first == ["one\ntwo"]
    assert second == ["one\ntwo", "heard **1**", "slow"]
    assert third == ["one\ntwo", "heard **1**", "slower"]
    history = tmp_path / "llama2" / "history"
    assert [json.loads(line) for line in history.read_text().splitlines()] == [
        "one\ntwo",
        "slow",
        "/edit",
        "slower",
    ]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.skipif(
    not importlib.util.find_spec("prompt_toolkit"), reason="prompt_toolkit is not installed"
)
def test_with_prompt_toolkit_alt_enter_begins_a_line_and_the_last_run_is_a_key_away(
    tmp_path: Path,
) -> None:
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "history").write_text('"from before"\n')
    with Conversation(tmp_path) as conversation:
        conversation.type("one\x1b\rtwo\\\rthree\r", "heard 1", "complete", ">")
        conversation.type('"""four\rfive"""\r', "heard 3", "complete", ">")
        conversation.type("\x1b[A", "five")
        conversation.type("\x03", "leaves", ">")
        conversation.type("/retry\r", "heard 3", "complete", ">")
        conversation.type("\x1b[A" * 7 + "\r", "heard 5", "complete", ">")
        asked = conversation.leave()

    assert [question[-1] for question in asked] == [
        "one\ntwo\nthree",
        "four\nfive",
        "four\nfive",
        "from before",
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train(["the quick brown fox jumps over the lazy dog " * 3] * 40, 300, path)
    config = LlamaConfig(tokenizer.vocab_size, 32, 48, 1, 2, 2, max_position_embeddings=80)
    checkpoint.save(Llama(config), path)
    tokenizer.save(path)

    return path


def test_a_checkpoint_answers(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n" + "the dog " * 40 + "\nthe dog\n"))
    with pytest.raises(SystemExit, match="2"):
        terminal.run(terminal.Config(checkpoint=directory, max_tokens=8))

    heard = capsys.readouterr()
    assert heard.out.count("\n") >= 2
    (line,) = heard.err.splitlines()
    assert line.startswith("llama2: error: the prompt has ")
    assert "context of 80" in line


def piped(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    **config: Any,
) -> tuple[int, int, list[str]]:
    """Exit status, answers and complaints of forty lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n" * 40))
    try:
        terminal.run(terminal.Config(checkpoint=directory, max_tokens=8, **config))
    except SystemExit as left:
        status = left.code
    else:
        status = 0

    heard = capsys.readouterr()
    assert isinstance(status, int)
    return status, heard.out.count("\n"), heard.err.splitlines()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(
    encoding: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    monkeypatch.setattr(ChatSession, "take", lambda session, line: said.append(line.strip()))
    content = "the f\u00f6x\r\nthe dog\r\n".encode(encoding)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content)), "utf-8")
    )
    terminal.run(terminal.Config(checkpoint=directory))
    assert said == ["the f\u00f6x", "the dog"]


def test_a_conversation_of_a_pipe_ends_where_the_context_does(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, complaints = piped(directory, monkeypatch, capsys)
    assert status == 2
    (line,) = complaints
    assert line.startswith("llama2: error: the prompt has ")
    assert line.endswith("the conversation ends here: --each-line answers every line alone")
    status, answers, complaints = piped(directory, monkeypatch, capsys, each_line=True)
    assert (status, complaints) == (0, [])
    assert answers >= 40


def test_a_foreign_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    checkpoint.save(Llama(LlamaConfig(310, 32, 48, 1, 2, 2)), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="300 pieces, the model 310"):
        terminal.run(terminal.Config(checkpoint=tmp_path))


def copied(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (None, "there is no chat template in its tokenizer_config.json"),
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}", "what the user says"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "done"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(
    directory: Path, tmp_path: Path, template: str | None, fault: str
) -> None:
    other = copied(directory, tmp_path / "other")
    Tokenizer.load(directory).with_chat_template(template).save(other)
    for refuse in (
        lambda: terminal.run(terminal.Config(checkpoint=other)),
        lambda: models.check(other),
    ):
        with pytest.raises(UserError) as raised:
            refuse()

        assert fault in raised.value.cause
        assert "--chat-template FILE" in raised.value.cure


def test_weights_that_say_nothing_are_refused(directory: Path, tmp_path: Path) -> None:
    ruined = copied(directory, tmp_path / "ruined")
    weights = load_file(ruined / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, ruined / "model.safetensors")
    (ruined / "checksums.json").unlink()

    with pytest.raises(UserError, match=r"ruined: the model's log-probabilities are not finite"):
        terminal.run(terminal.Config(checkpoint=ruined))
