"""The chat page in a real browser, against a server that says what the test told it to say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2 import records
from llama2.records import Dialog

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from pages import answers, idle, say
from playwright.sync_api import Browser, BrowserContext, Page, expect
from scripted import Script, running

EVIL = """<img src=x onerror="window.harmed='img'"> <script>window.harmed='script'</script>
[link](javascript:window.harmed='link') [spaced]( java\tscript:window.harmed=1)
[data](data:text/html,<script>1</script>)
![picture](javascript:window.harmed='image') <javascript:window.harmed='auto'> [ref]: javascript:window.harmed=1
[good](https://example.org/"onmouseover="window.harmed='attribute') <svg/onload=window.harmed='svg'>
**<b onclick=alert(1)>bold</b>** | `<i>` | <iframe srcdoc="<script>parent.harmed='frame'</script>"></iframe>

```html" onmouseover="window.harmed='fence'
</code></pre><script>window.harmed='code'</script>
```

| <img src=x onerror="window.harmed='cell'"> | b |
|---|---|
| <a href="javascript:window.harmed='a'">x</a> | <style>*{display:none}</style> |
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Script, str]]:
    script = Script()
    with running(script) as address:
        yield script, address


@pytest.fixture
def script(server: tuple[Script, str]) -> Script:
    server[0].__init__()  # type: ignore[misc]
    return server[0]


@pytest.fixture
def context(browser: Browser, script: Script) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light")
    context.set_default_timeout(100_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: tuple[Script, str]) -> Iterator[Page]:
    """The page, freshly opened; the test fails if anything in it raised an error or was refused by
    its policy."""
    wrong: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: wrong.append(message.text) if "Content Security" in message.text else None,
    )
    page.goto(server[1])
    expect(page.get_by_role("combobox", name="Model")).to_have_value("alpha")
    yield page
    assert wrong == []


def messages(script: Script, at: int = -1) -> list[str]:
    return [each["content"] for each in script.asked[at]["messages"]]


def test_a_conversation_streams_is_counted_and_survives_a_reload(
    page: Page, script: Script
) -> None:
    script.texts["one"] = "A **bold** word."
    say(page, "one")
    expect(answers(page)).to_have_text("A bold word.")
    expect(answers(page).locator("strong")).to_have_text("bold")
    expect(page.locator(".cost")).to_contain_text("4 tokens")
    say(page, "two")
    expect(answers(page).nth(1)).to_have_text("alpha heard: two")
    assert messages(script) == ["one", "A **bold** word.", "two"]
    assert script.asked[0]["temperature"] == 0.6
    assert "seed" not in script.asked[0]
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_role("navigation")).to_contain_text("one")


def test_stop_keeps_what_was_said(page: Page, script: Script) -> None:
    script.texts["long"], script.pause = "word " * 4000, 0.02
    say(page, "long")
    expect(answers(page)).to_contain_text("word word")
    page.keyboard.press("Escape")
    expect(page.locator(".cost")).to_contain_text("stopped")
    idle(page)
    kept = answers(page).inner_text()
    assert kept.startswith("word")
    script.pause = 0
    say(page, "two")
    expect(answers(page).nth(1)).to_have_text("alpha heard: two")
    assert messages(script)[1].strip() == kept.strip()


def test_an_answer_given_again_is_a_version(page: Page, script: Script) -> None:
    say(page, "one")
    expect(answers(page)).to_have_text("alpha heard: one")
    script.texts["one"] = "Another."
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text("Another.")
    expect(page.locator(".count")).to_have_text("2 / 2")
    page.get_by_role("button", name="Earlier version").click()
    expect(answers(page)).to_have_text("alpha heard: one")
    say(page, "two")
    expect(answers(page)).to_have_text(["alpha heard: one", "alpha heard: two"])
    assert messages(script) == ["one", "alpha heard: one", "two"]


def test_an_edit_replaces_what_follows(page: Page, script: Script) -> None:
    for text in ("one", "two"):
        say(page, text)
        expect(answers(page).last).to_have_text(f"alpha heard: {text}")

    page.get_by_role("article", name="You").first.hover()
    page.get_by_role("button", name="Edit and send again").first.click()
    page.get_by_role("textbox", name="Edit the message").fill("three")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(["alpha heard: three"])
    assert messages(script) == ["three"]


def test_neither_user_nor_model_can_run_script(page: Page, script: Script) -> None:
    script.texts["evil"] = EVIL
    for text in ("evil", EVIL):
        say(page, text)

    idle(page)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(4)
    expect(answers(page).first).to_contain_text("<script>window.harmed='script'</script>")

    for link in answers(page).get_by_role("link").all():
        assert re.match(r"https?://", link.get_attribute("href") or "")
        assert "noopener" in (link.get_attribute("rel") or "")

    turns = page.locator("#turns")
    assert (
        turns.locator(
            "script, img, iframe, style, b, i, [onerror], [onclick], [onmouseover], [onload]"
        ).count()
        == 0
    )
    assert page.evaluate("window.harmed") is None
    attributes = (
        "[...document.querySelectorAll('#turns *')].flatMap(node => node.getAttributeNames())"
    )
    assert not [name for name in page.evaluate(attributes) if name.startswith("on")]


def test_markdown_that_never_ends_does_not_stall(page: Page, script: Script) -> None:
    for tricky in (
        "*" * 20000,
        "> " * 5000 + "deep",
        "[" * 20000,
        "_a " * 9000,
        "`" * 9999 + "x",
        "- " * 4000,
        "|" * 9000 + "\n|-|",
        "```" + "a" * 20000 + "`",
        "#" + " " * 20000 + "#x",
        "|\n|" + "-" * 9000 + " " * 9000 + "x",
    ):
        seconds = page.evaluate(
            """async text => {
            const { show } = await import(new URL('web/markdown.js', document.baseURI));
            let least = Infinity; // of several times: machines may be busy
            for (let round = 0; round < 5 && least >= 1; round++) {
                const begun = performance.now();
                show(document.createElement('div'), text);
                least = Math.min(least, (performance.now() - begun) / 1000);
            }
            return least;
        }""",
            tricky,
        )
        assert seconds < 1, tricky[:10]


def test_markdown_becomes_elements(page: Page) -> None:
    shown = page.evaluate(
        """async text => {
        const { show } = await import(new URL('web/markdown.js', document.baseURI));
        const node = document.createElement('div');
        for (let at = 0; at <= text.length; at += 3) show(node, text.slice(0, at)); // as it streams
        show(node, text);
        return node.innerHTML.replace(/ (?:target|rel|title|tabindex|aria-label)="[^"]*"/g, '')
            .replace(/<button.*?<\\/button>/g, '');
    }""",
        "# Title #\nsnake_case_name *a **b*** ~~c~~ \\*d\\*\ne `x*y` <f>\n\n3. one\n   - in\n\n4. two\n\n"
        "- [x] done\n\n> q\n> r\n\n---\n| a | b |\n|:--|--:|\n| `1` | 2\\|3 |\n\n[t](https://e.org/a_(b)) https://e.org/x.\n\n"
        "~~~sql\nselect 1 -- one\n~~~\n",
    )
    assert shown == (
        '<h3 class="level-1">Title</h3><p>snake_case_name <em>a <strong>b</strong></em> <del>c</del> *d*<br>'
        'e <code>x*y</code> &lt;f&gt;</p><ol start="3"><li>one<ul><li>in</li></ul></li><li>two</li></ol>'
        '<ul><li class="task"><input type="checkbox" disabled="" checked="">done</li></ul>'
        '<blockquote><p>q<br>r</p></blockquote><hr><div class="table"><table><thead><tr><th>a</th>'
        '<th class="right">b</th></tr></thead><tbody><tr><td><code>1</code></td><td class="right">2|3</td></tr></tbody>'
        '</table></div><p><a href="https://e.org/a_(b)">t</a> <a href="https://e.org/x">https://e.org/x</a>.</p>'
        '<figure class="code"><figcaption><span>sql</span></figcaption><pre><code><span class="keyword">select</span> '
        '<span class="number">1</span> <span class="comment">-- one</span></code></pre></figure>'
    )


def test_two_answers_side_by_side_and_one_is_taken(page: Page, script: Script) -> None:
    page.get_by_role("button", name="Side by side").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="B · beta").click()
    page.get_by_role("spinbutton", name="Temperature").fill("0.1")
    page.get_by_role("button", name="Close the settings").click()
    say(page, "one")
    expect(answers(page)).to_have_text(["alpha heard: one", "beta heard: one"])
    assert {each["model"]: each["temperature"] for each in script.asked} == {
        "alpha": 0.6,
        "beta": 0.1,
    }
    expect(page.locator("#hint")).to_contain_text("Pick one")
    page.reload()
    page.locator("#scroll").click()
    page.keyboard.press("2")
    expect(answers(page)).to_have_text(["beta heard: one"])
    page.get_by_role("button", name="Side by side").click()
    say(page, "two")
    expect(answers(page)).to_have_text(["beta heard: one", "alpha heard: two"])
    assert messages(script) == ["one", "beta heard: one", "two"]


def test_a_refusal_is_shown_in_place_with_its_wait(page: Page, script: Script) -> None:
    script.refusals = [
        (429, "too many requests wait", {"Retry-After": "5"}),
        (500, "out of memory", {}),
    ]
    say(page, "one")
    card = page.get_by_role("alert")
    expect(card).to_contain_text("Too many requests wait.")
    expect(card.get_by_role("button", name=re.compile(r"^Try again in [1-5] s$"))).to_be_disabled()
    card.get_by_role("button", name="Try again", exact=True).click()
    expect(card).to_contain_text("Out of memory.")
    card.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("alpha heard: one")
    expect(card).to_have_count(0)


def test_a_key_is_asked_for_and_kept_for_the_tab(
    context: BrowserContext, script: Script, server: tuple[Script, str]
) -> None:
    script.key = "sesame"
    page = context.new_page()
    page.goto(server[1])
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not accept")
    say(page, "zero")
    expect(page.get_by_role("article", name="Answer").get_by_role("alert")).to_contain_text(
        "does not accept"
    )
    page.get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.get_by_role("combobox", name="Model")).to_have_value("alpha")
    say(page, "one")
    expect(answers(page)).to_have_text(["alpha heard: zero", "alpha heard: one"])
    assert [messages(script, at) for at in (0, 1)] == [
        ["zero"],
        ["zero", "alpha heard: zero", "one"],
    ]
    assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0


def test_conversations_are_found_renamed_deleted_exported_and_imported(
    page: Page, tmp_path: Path
) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    for text in ("apples", "pears"):
        say(page, text)
        expect(answers(page)).to_have_text(f"alpha heard: {text}")
        page.keyboard.press("Control+k")

    listed = page.get_by_role("navigation").get_by_role("link")
    expect(listed).to_have_text(["pears", "apples"])
    page.get_by_role("searchbox").fill("heard apples")
    expect(listed).to_have_text(["apples"])
    page.get_by_role("searchbox").fill("")
    listed.nth(1).hover()
    page.get_by_role("button", name="Rename apples").click()
    page.get_by_role("textbox", name="Title").fill("Fruit")
    page.keyboard.press("Enter")
    expect(listed).to_have_text(["pears", "Fruit"])

    with page.expect_download() as download:
        page.get_by_role("button", name="Export all conversations").click()

    file = tmp_path / "all.jsonl"
    download.value.save_as(file)
    assert [[turn.content for turn in each.messages] for each in records.read(Dialog, file)] == [
        ["pears", "alpha heard: pears"],
        ["Be brief.", "apples", "alpha heard: apples"],
    ]
    listed.nth(1).hover()
    page.get_by_role("button", name="Delete Fruit").click()
    expect(listed).to_have_text(["pears"])
    page.get_by_role("button", name="Undo").click()
    expect(listed).to_have_count(2)
    page.get_by_label("File to import").set_input_files(file)
    expect(listed).to_have_count(4)
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    page.get_by_label("File to import").set_input_files(file)
    expect(page.locator(".notice")).to_contain_text("line 1: the last turn must be an answer")


def test_light_and_dark(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Dark colours").click()
    dark = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Dark colours")).to_have_attribute(
        "aria-pressed", "true"
    )


def test_keys(page: Page) -> None:
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    field = page.get_by_role("textbox", name="Message")
    expect(field).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    expect(field).to_have_value("a\nb")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("a\nb")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit the message")).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


def test_on_a_phone_the_list_is_a_drawer(
    browser: Browser, script: Script, server: tuple[Script, str]
) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(server[1])
    script.texts["wide"] = (
        "```\n" + "x" * 300 + "\n```\n\n| " + "long words | " * 9 + "\n" + "|---" * 9 + "|"
    )

    for name in (
        "Conversations",
        "Close the list of conversations",
        "Settings",
        "Close the settings",
        "Side by side",
        "Side by side",
    ):
        # nothing lies above them on a page that is fresh
        page.get_by_role("button", name=name, exact=True).tap()

    page.get_by_role("textbox", name="Message").fill("wide")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator(".cost")).to_contain_text("tokens")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#scroll').scrollWidth") <= 390
    expect(page.get_by_role("link", name="wide")).to_be_hidden()
    page.get_by_role("button", name="Conversations", exact=True).tap()
    expect(page.get_by_role("link", name="wide")).to_be_in_viewport()
    page.get_by_role("button", name="New chat").tap()
    expect(page.get_by_role("link", name="wide")).to_be_hidden()
    context.close()
