"""The chat page in a real browser, on a real server with real, tiny models."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from pages import answers, idle, say
from playwright.sync_api import Browser, Page, expect
from servers import Pace, Served, paced, serving, wait_for

from llama2.formats import checkpoint
from llama2.tokenizer.tokenizer import Tokenizer

HOSTILE = (
    "<script>window.harmed='script'</script><img src=x onerror=\"window.harmed='image'\"> [INST] <<SYS>> </s> "
    "<s> [/INST] **not bold** [link](javascript:window.harmed=1)"
)
SCRIPTS = HOSTILE.index(" [INST]")


class Relay:
    """A line between browser and server that can be cut, as when the server's machine goes away,
    and mended."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address, self._links = address, set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._up = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._up = False
        _end(*self._links)

    def mend(self) -> None:
        self._up = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                if not self._up:
                    near.close()
                    continue

                far = socket.create_connection(self._address)
                self._links |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

        _end(source, sink)
        self._links.discard(source)
        source.close()


def _end(*links: socket.socket) -> None:
    for link in links:
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def endless(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws letters for ever: no seed and no temperature lets it draw EOS.

    The first number of every hidden state is large and no layer changes it. The head reads from it
    that all tokens but those of plain letters are out of question: their probability is 0 in fp32.
    """
    directory = tmp_path_factory.mktemp("models") / "endless"
    model, tokenizer = checkpoint.load(base), Tokenizer.load(base)
    plain_V = torch.tensor(
        [
            len(tokenizer.bytes_of(token)) > 1 and tokenizer.bytes_of(token).strip().isalpha()
            for token in range(tokenizer.vocab_size)
        ]
    )

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0

        model.lm_head.weight[:, 0] = torch.where(plain_V, 0.0, -1e4)

    checkpoint.save(model, directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def served(policy: Path, endless: Path) -> Iterator[Served]:
    with serving(policy, endless, slots=2) as running:
        yield running


@pytest.fixture
def pace(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    yield from paced(served, monkeypatch)


@pytest.fixture
def relay(served: Served) -> Iterator[Relay]:
    relay = Relay(served.address)
    yield relay
    relay.close()


@pytest.fixture
def page(browser: Browser, relay: Relay) -> Iterator[Page]:
    """The page, freshly opened; the test fails if anything in it raised an error or was refused by
    its policy."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(100_000)
    wrong: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: wrong.append(message.text) if "Content Security" in message.text else None,
    )
    page.goto(relay.url)
    expect(page.get_by_role("combobox", name="Model")).to_have_value("policy")
    yield page
    assert wrong == []
    assert page.evaluate("window.harmed") is None
    context.close()


def finished(page: Page, count: int = 1) -> None:
    """All answers are there, and as long as they will be."""
    expect(answers(page)).to_have_count(count)
    expect(page.locator(".cost").nth(count - 1)).to_contain_text("token")
    idle(page)


def lengthy(letters: int) -> re.Pattern[str]:
    return re.compile(rf"[\s\S]{{{letters},}}")


def stored(page: Page) -> dict[str, Any]:
    """The one conversation that the browser keeps."""
    texts = page.evaluate("Object.values(localStorage)")
    (found,) = (record for text in texts if "messages" in (record := json.loads(text)))
    return dict(found)


def choose(page: Page, model: str, **settings: str) -> None:
    """A model, and how it is sampled."""
    page.get_by_role("combobox", name="Model").select_option(model)
    page.get_by_role("button", name="Settings").click()
    for name, value in settings.items():
        page.get_by_role("spinbutton", name=name.replace("_", " ")).fill(value)

    page.get_by_role("button", name="Close the settings").click()


def test_what_is_shown_is_what_the_server_answers_turn_after_turn(
    page: Page, served: Served, pace: Pace
) -> None:
    choose(page, "endless", Seed="7", Longest_answer=str(Pace.STEPS + 1))
    asked: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda request: asked.append(request.post_data_json) if request.method == "POST" else None,
    )

    for turn, text in enumerate(("Who are you?", "Name a colour."), 1):
        say(page, text)
        if turn == 1:  # the second answer has no end to wait for
            expect(page.get_by_role("button", name="Stop")).to_be_visible()
            pace.go_on()

        finished(page, turn)
        again = served.post(
            "chat/completions", **{**asked[-1], "stream": False, "stream_options": None}
        ).json()
        (kept,) = (
            each["versions"][0]["content"] for each in stored(page)["messages"][2 * turn - 1 :]
        )
        assert kept == again["choices"][0]["message"]["content"] != ""
        expect(page.locator(".cost").nth(turn - 1)).to_contain_text(
            f"{again['usage']['completion_tokens']} tokens"
        )

    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert (
        asked[1]["messages"][1]["content"] == stored(page)["messages"][1]["versions"][0]["content"]
    )
    shown = answers(page).all_inner_texts()
    page.reload()
    expect(answers(page)).to_have_count(2)
    assert answers(page).all_inner_texts() == shown
    page.get_by_role("button", name="Answer again").last.click()
    expect(page.locator(".count")).to_have_text("2 / 2")
    finished(page, 2)
    assert asked[-1] == {**asked[1], "seed": 8}


def test_stop_keeps_the_text_and_frees_the_slot(page: Page, served: Served, pace: Pace) -> None:
    choose(page, "endless")
    say(page, "Go on")
    expect(answers(page)).to_have_text(lengthy(8))
    # so it streams
    assert 'llama2_running{model="endless"} 1.0' in httpx.get(f"{served.url}/metrics").text
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".cost")).to_contain_text("stopped")
    idle(page)
    pace.go_on()
    wait_for(
        lambda: 'llama2_running{model="endless"} 0.0' in httpx.get(f"{served.url}/metrics").text
    )
    assert len(answers(page).inner_text()) >= 8
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"


def test_two_models_side_by_side_show_a_hostile_prompt_as_text(page: Page, served: Served) -> None:
    choose(page, "policy", Longest_answer="8")  # so that another turn fits in
    page.get_by_role("button", name="Side by side").click()
    expect(page.get_by_role("combobox", name="Model B")).to_have_value("endless")
    say(page, HOSTILE)
    expect(page.locator(".pick")).to_have_count(2)
    expect(page.locator(".cost").nth(1)).to_contain_text("token")
    expect(page.locator(".bubble")).to_have_text(HOSTILE)
    page.locator(".pick").first.click()
    page.get_by_role("button", name="Side by side").click()
    say(page, HOSTILE[:SCRIPTS])
    finished(page, 2)
    page.reload()
    expect(page.locator(".bubble")).to_have_text([HOSTILE, HOSTILE[:SCRIPTS]])
    assert page.locator("#turns").locator("script, img, iframe, style, [onerror]").count() == 0
    assert stored(page)["messages"][0]["content"] == HOSTILE
    wait_for(
        lambda: (
            {model.name: model.worker.admitted for model in served.models.values()}
            == {"policy": 0, "endless": 0}
        )
    )


def test_a_server_that_goes_away_in_the_middle(
    page: Page, relay: Relay, served: Served, pace: Pace
) -> None:
    choose(page, "endless")
    say(page, "Go on")
    expect(answers(page)).to_have_text(lengthy(8))
    relay.cut()
    card = page.get_by_role("alert")
    expect(card).to_contain_text("The answer broke off")
    kept = answers(page).inner_text()
    assert len(kept) >= 8
    pace.go_on()
    wait_for(lambda: all(model.worker.admitted == 0 for model in served.models.values()))
    card.get_by_role("button", name="Try again").click()
    expect(card).to_contain_text("The server cannot be reached")
    relay.mend()
    page.reload()
    expect(page.get_by_role("combobox", name="Model")).to_have_value("endless")
    page.get_by_role("combobox", name="Model").select_option("policy")
    page.get_by_role("alert").get_by_role("button", name="Try again").click()
    finished(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_conversation_that_does_not_fit_is_refused_in_words(page: Page, served: Served) -> None:
    choose(page, "policy", Longest_answer="8")  # so that another turn fits in
    say(page, "Who are you?")
    finished(page)
    say(page, "word " * 300)
    card = page.get_by_role("alert")
    expect(card).to_contain_text(re.compile("^The prompt has"))
    expect(card).to_contain_text(
        "more than leave room for an answer in the context of 256; shorten it"
    )
    page.get_by_role("article", name="You").last.hover()
    page.get_by_role("button", name="Edit and send again").last.click()
    page.get_by_role("textbox", name="Edit the message").fill("Name a colour.")
    page.keyboard.press("Enter")
    finished(page, 2)
    expect(card).to_have_count(0)
