"""Basic cleaning of documents (§2.1): broken characters, boilerplate lines, personal data, documents without content.

The paper says that sites known to hold much personal information were removed and that cleaning was "more robust", no
more; the rules here are the usual ones. Each counts what it did, so that a report can show it.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llama2.records import Document

# Cc without tab and newline, zero-width and direction marks, the byte order mark, and line separators
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BOILERPLATE = re.compile(
    r"(all rights reserved|\bcookies? (polic|settings|consent)|\b(accept|reject)( all)? cookies\b"
    r"|\b(we|site|website) uses? cookies\b"
    r"|privacy policy|terms of (use|service)|terms (and|&) conditions|sign up (for|to)\b|subscribe to (our|the)\b"
    r"|(enable|requires?) javascript|click here to\b|skip to (main )?content|share (this )?on (facebook|twitter|x)\b"
    r"|^(home|log ?in|sign ?in|sign ?up|register|menu|search|share|tweet|advertisement|read more|next|previous)"
    r"(\s*[|>/·»]\s*[\w ]{1,20})*$)",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-zA-Z]{2,24}\b")
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_PHONE = re.compile(
    r"(?<![\w.,/-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +44 20 7946 0018
    r"|(?:1[ .-])?\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}"  # (555) 010-9999
    r"|(?:1[ .-])?\d{3}([ .-])\d{3}\1\d{4}"  # 555-010-9999
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}"  # 020 7946 0018
    r")(?![\w-]|[.,]\d)"
)


@dataclass(frozen=True)
class Rules:
    """What to clean. A document is dropped below `min_characters`, or when more than `max_repeated` of its characters
    lie in lines that it repeats, or when one word makes up more than `max_one_word` of 50 words and more."""

    min_characters: int = 20
    max_repeated: float = 0.3
    max_one_word: float = 0.3
    remove_boilerplate: bool = True
    mask_personal_data: bool = True


def clean(
    documents: Iterable[Document], rules: Rules = Rules(), counts: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents worth keeping, cleaned. `counts` receives what each rule did, and the documents in and out."""
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
    """One text with broken characters, boilerplate lines and personal data taken care of."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n"))
    text, removed = _CONTROL.subn("", text)
    counts["control characters removed"] += removed
    lines = [_SPACES.sub(" ", line).rstrip() for line in text.split("\n")]
    if rules.remove_boilerplate:
        kept = [line for line in lines if len(line) > 200 or not _BOILERPLATE.search(line.strip())]
        counts["boilerplate lines removed"] += len(lines) - len(kept)
        lines = kept
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    return mask_personal_data(text, counts) if rules.mask_personal_data else text


def mask_personal_data(text: str, counts: Counter[str]) -> str:
    """E-mail addresses, telephone numbers and IP addresses replaced by [email], [phone] and [ip address]."""
    text, emails = _EMAIL.subn("[email]", text)
    counts["e-mail addresses masked"] += emails

    def mask_ip(found: re.Match[str]) -> str:
        try:
            ipaddress.IPv4Address(found[0])
        except ValueError:
            return found[0]
        counts["IP addresses masked"] += 1
        return "[ip address]"

    text, phones = _PHONE.subn("[phone]", _IP.sub(mask_ip, text))
    counts["telephone numbers masked"] += phones
    return text


def _unfit(text: str, rules: Rules) -> str:
    """Why a text is not worth keeping, or nothing."""
    if len(text.strip()) < rules.min_characters:
        return "too short"
    if text.count("\ufffd") > 0.01 * len(text):
        return "broken encoding"
    lines = Counter(line.strip() for line in text.split("\n") if line.strip())
    repeated = sum(len(line) * (count - 1) for line, count in lines.items())
    if repeated > rules.max_repeated * len(text):
        return "repeated lines"
    words = text.lower().split()
    if len(words) >= 50 and Counter(words).most_common(1)[0][1] > rules.max_one_word * len(words):
        return "one word over and over"
    return ""
