"""What a user does on the chat page."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page, expect


def say(page: Page, text: str) -> None:
    idle(page)
    page.get_by_role("textbox", name="Message").fill(text)
    page.keyboard.press("Enter")


def idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def answers(page: Page) -> Any:
    return page.get_by_role("article", name="Answer").locator(".text")
