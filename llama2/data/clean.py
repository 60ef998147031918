"""Basic cleaning of documents (§2.1): broken characters, boilerplate lines, personal data,
documents without content.

The paper says that sites known to hold much personal information were removed and that cleaning was
"more robust", no more; the rules here are the usual ones. Each counts what it did, so that a report
can show it.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llama2.records import Document

# Cc without tab and newline, zero-width and direction marks, the byte order mark, and line
# separators
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_PHRASES = (  # what a boilerplate line holds or begins with, in lower case
    "all rights reserved",
    "cookie policy",
    "cookie settings",
    "use cookies",
    "uses cookies",
    "accept all cookies",
    "accept cookies",
    "privacy policy",
    "terms of use",
    "terms of service",
    "terms and conditions",
    "terms & conditions",
    "sign up for",
    "subscribe to our",
    "enable javascript",
    "requires javascript",
    "click here to",
)
_BEGINNINGS = (
    "skip to content",
    "skip to main content",
    "back to top",
    "read more",
    "share on",
    "share this",
    "advertisement",
)
_NAVIGATION = {
    "home",
    "about",
    "contact",
    "login",
    "log",
    "in",
    "sign",
    "up",
    "register",
    "menu",
    "search",
    "shop",
    "cart",
    "blog",
    "news",
    "faq",
    "next",
    "previous",
    "share",
    "tweet",
    "|",
    ">",
    "/",
    "·",
    "»",
    "•",
}
_SYMBOL = re.compile(r"[\W_]")
_TAGS = re.compile(r"(?:\s*</?[a-zA-Z][^<>]*>)+")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-zA-Z]{2,24}\b")
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
# IP addresses and telephone numbers hold this, most texts do not
_DIGITS = re.compile(r"\d(?:[^\d\n]{0,3}\d){3}")
_PHONE = re.compile(
    r"(?<![\w.,/-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +44 20 7946 0018
    r"|(?:1[ .-])?\(\d{3}\)[ .-]?\d{3,4}[ .-]\d{4}"  # (555) 010-9999
    r"|(?:1[ .-])?\d{3}([ .-])\d{3}\1\d{4}"  # 555-010-9999
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}"  # 020 7946 0018
    r")(?![\w-]|[.,]\d)"
)


@dataclass(frozen=True)
class Rules:
    """Rules of cleaning. A document is dropped below `min_characters`, or when more than
    `max_symbols` of its visible characters are neither letters nor digits, or more than
    `max_repeated` of its characters lie in lines that it repeats, or one word makes up more than
    `max_one_word` of 50 words and more."""

    min_characters: int = 20
    max_symbols: float = 0.7
    max_repeated: float = 0.3
    max_one_word: float = 0.3
    remove_boilerplate: bool = True
    mask_personal_data: bool = True


def clean(
    documents: Iterable[Document], rules: Rules = Rules(), counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Give the documents worth keeping, cleaned. `counts` receives what each rule did, and the
    documents in and out."""
    counts = Counter() if counts is None else counts
    for document in documents:
        counts["documents"] += 1
        text = clean_text(document.text, rules, counts)
        reason = _unfit(text, rules)

        if reason:
            counts[f"dropped: {reason}"] += 1
            continue

        counts["kept"] += 1
        yield document if text == document.text else replace(document, text=text)


def clean_text(text: str, rules: Rules, counts: Counter[str]) -> str:
    """Clean a text of broken characters, boilerplate lines and personal data."""
    text = unicodedata.normalize(
        "NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n")
    )
    text = text.replace("&nbsp;", " ")
    text, removed = _CONTROL.subn("", text)
    counts["control characters removed"] += removed
    lines = [line.rstrip() for line in _SPACES.sub(" ", text).split("\n")]

    if rules.remove_boilerplate:
        content = [line for line in lines if not is_boilerplate(line)]
        counts["boilerplate lines removed"] += len(lines) - len(content)
        lines = content

    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    return mask_personal_data(text, counts) if rules.mask_personal_data else text


def is_boilerplate(line: str) -> bool:
    """Tell whether a line is a menu, a notice, a footer or nothing but tags. Lines of over 200
    characters never are."""
    words = line.lower().split()
    if not words or len(line) > 200:
        return False

    plain = " ".join(words)
    return (
        plain.startswith(_BEGINNINGS)
        or any(phrase in plain for phrase in _PHRASES)
        or _NAVIGATION.issuperset(words)
        or (plain[0] == "<" and bool(_TAGS.fullmatch(plain)))
    )


def mask_personal_data(text: str, counts: Counter[str]) -> str:
    """Replace e-mail addresses, telephone numbers and IP addresses by [email], [phone] and [ip
    address]."""
    if "@" in text:
        text, emails = _EMAIL.subn("[email]", text)
        counts["e-mail addresses masked"] += emails

    if not _DIGITS.search(text):
        return text

    def mask_ip(match: re.Match[str]) -> str:
        try:
            ipaddress.IPv4Address(match[0])
        except ValueError:
            return match[0]

        counts["IP addresses masked"] += 1
        return "[ip address]"

    text, phones = _PHONE.subn("[phone]", _IP.sub(mask_ip, text))
    counts["telephone numbers masked"] += phones
    return text


def _unfit(text: str, rules: Rules) -> str:
    """Say why a text is not worth keeping; "" if it is."""
    if len(text.strip()) < rules.min_characters:
        return "too short"
    if text.count("\ufffd") > 0.01 * len(text):
        return "broken encoding"

    visible = "".join(text.split())
    if len(_SYMBOL.findall(visible)) > rules.max_symbols * len(visible):
        return "mostly symbols"

    lines = Counter(line.strip() for line in text.split("\n"))
    repeated = sum(len(line) * (count - 1) for line, count in lines.items())
    if repeated > rules.max_repeated * len(text):
        return "repeated lines"

    words = text.lower().split()
    if len(words) >= 50 and Counter(words).most_common(1)[0][1] > rules.max_one_word * len(words):
        return "one word over and over"

    return ""
