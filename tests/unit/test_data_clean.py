"""Cleaning and deduplication: what each rule takes out, what it leaves alone, and that it
counts."""

from collections import Counter

import pytest

from llama2.data.clean import Rules, clean, clean_text, mask_personal_data
from llama2.data.deduplicate import drop_duplicates, drop_repeated_lines, fingerprint
from llama2.records import Document


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jo.doe+x@mail.example.org.", "Write to [email]."),
        ("from 1.2.3.4", "from [ip address]"),
        ("Server 192.168.10.254, port 80", "Server [ip address], port 80"),
        ("Call (555) 010-9999 now", "Call [phone] now"),
        ("Call 555-010-9999.", "Call [phone]."),
        ("Call Ann at (555) 0166-7117", "Call Ann at [phone]"),
        ("Call +44 20 7946 0018 or 1-800-555-0199", "Call [phone] or [phone]"),
        ("Ring 020 7946 0018!", "Ring [phone]!"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    counts: Counter[str] = Counter()
    assert mask_personal_data(text, counts) == masked
    assert counts.total() == masked.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "On 2023-07-19 we counted 1,234,567.89 sheep",
        "version 1.2.3 of 300.1.2.3",
        "12 + 345 = 357",
        "ISBN 978-3-16-148410-0",
        "pages 100-1234",
        "an @ sign, a@b",
        "1914-1918",
        "3.14159265358979",
        "0.5 to 0.75",
    ],
)
def test_other_numbers_are_left_alone(text: str) -> None:
    assert mask_personal_data(text, Counter()) == text


def test_broken_characters_and_lines() -> None:
    counts: Counter[str] = Counter()
    dirty = "\ufeffA\u00a0b\x00 \r\n\n\n\ncafe\u0301\u200b  \nAccept all cookies\nHome | About\nend"
    text = clean_text(dirty, Rules(), counts)
    assert text == "A b\n\ncafé\nend"
    assert (counts["control characters removed"], counts["boilerplate lines removed"]) == (3, 2)


@pytest.mark.parametrize(
    "line",
    [
        "Home | About | Contact | Login",
        "MENU  SEARCH  SHOP",
        "Skip to main content",
        '<div class="nav">',
        "We use cookies to improve your experience.",
        "Please enable JavaScript to continue.",
        "</div></body>",
        "Subscribe to our newsletter!",
        "Click here to read more...",
        "  Share  on:  Chirper | Facepage &nbsp;",
        "Copyright 2023. All rights reserved.",
        "Terms of use | Privacy policy",
        "Back to top",
    ],
)
def test_boilerplate_lines(line: str) -> None:
    counts: Counter[str] = Counter()
    assert clean_text(f"before\n{line}\nafter", Rules(), counts) == "before\nafter"
    assert counts["boilerplate lines removed"] == 1


def test_a_sentence_about_menus_stays() -> None:
    text = (
        "Home is where the heart is.\nI use two cookies a day; she accepts.\nNext day they searched for the menu.\n"
        "    if share: search()\n\tx <b>\n3 + 4 = 7"
    )
    assert clean_text(text, Rules(), Counter()) == text


def test_documents_are_dropped_by_rule_and_counted() -> None:
    documents = [
        Document(text)
        for text in (
            "A fine document with enough text in it.",
            "short",
            "same line here\n" * 9,
            "buy " * 60 + "now",
            "\ufffd" * 40,
            "$%&*+=~ ^_|<>#$ &*+x",
        )
    ]
    counts: Counter[str] = Counter()
    kept = list(clean(iter(documents), Rules(), counts))
    assert kept == documents[:1]
    assert kept[0] is documents[0]
    assert {name: count for name, count in counts.items() if count} == {
        "documents": 6,
        "kept": 1,
        "dropped: mostly symbols": 1,
        "dropped: too short": 1,
        "dropped: repeated lines": 1,
        "dropped: one word over and over": 1,
        "dropped: broken encoding": 1,
    }


def test_rules_can_be_turned_off() -> None:
    off = Rules(
        min_characters=0,
        max_repeated=1,
        max_one_word=1,
        remove_boilerplate=False,
        mask_personal_data=False,
    )
    documents = [Document("a@b.org"), Document("Privacy policy"), Document("x\n" * 60)]
    assert [document.text for document in clean(documents, off)] == [
        "a@b.org",
        "Privacy policy",
        ("x\n" * 60).strip(),
    ]


def test_exact_duplicates() -> None:
    documents = [
        Document(text, str(index))
        for index, text in enumerate(
            ["The mill, old.", "the  MILL old", "The mill is old.", "?!", "!?", "?!"]
        )
    ]
    counts: Counter[str] = Counter()
    assert [document.id for document in drop_duplicates(documents, counts)] == ["0", "2", "3", "4"]
    assert counts == {"duplicate documents removed": 2}
    assert fingerprint("ÀB") == fingerprint("àb") != fingerprint("ab")


def test_lines_of_many_documents() -> None:
    documents = [Document(f"Site name\nStory number {number}.\n\nImprint") for number in range(6)]
    documents.append(Document("Imprint"))
    counts: Counter[str] = Counter()
    kept = [document.text for document in drop_repeated_lines(documents, counts, limit=2)]
    assert kept[:2] == [document.text for document in documents[:2]]
    assert kept[2:] == [f"Story number {number}." for number in range(2, 6)]
    assert counts == {"repeated lines removed": 9, "documents of repeated lines removed": 1}


def test_a_line_twice_in_one_document_is_no_boilerplate() -> None:
    song = Document("la la\nverse\nla la\nla la")
    assert list(drop_repeated_lines([song], limit=1)) == [song]


def test_few_lines_are_remembered() -> None:
    documents = [Document(f"Imprint\nunique {number}") for number in range(100)]
    kept = list(drop_repeated_lines(documents, limit=3, max_lines=10))
    assert [document.text.count("Imprint") for document in kept] == [1] * 3 + [0] * 97
