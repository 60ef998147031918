"""Pages as a crawl would find them: boilerplate, personal data, duplicates and garbage around a
little good text.

They make cleaning and exact deduplication visibly do something (§2.1). Addresses use reserved
domains and numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

HEADERS = (
    "Home | About | Contact | Login",
    "Skip to main content",
    "MENU  SEARCH  SHOP",
    '<div class="nav">',
)
NOTICES = (
    "We use cookies to improve your experience. Accept all cookies.",
    "Please enable JavaScript to continue.",
    "Subscribe to our newsletter!!!",
    "Click here to read more...",
    "Share on: Chirper | Facepage | Pin",
)
FOOTERS = (
    "Copyright 2023. All rights reserved.",
    "Terms of use | Privacy policy",
    "Back to top",
    "</div></body>",
)
NOISE = "#$%&*+=~^_|<>"
DUPLICATES, GARBAGE, PERSONAL = 0.20, 0.05, 0.35


def write_pages(
    bodies: Sequence[Iterator[str]], people: Sequence[str], rng: Random
) -> Iterator[str]:
    """Write endless pages with text from `bodies`; one in five is a copy of a recent page."""
    recent: list[str] = []
    while True:
        if recent and rng.random() < DUPLICATES:
            yield rng.choice(recent)
            continue

        page = _garbage(rng) if rng.random() < GARBAGE else _page(bodies, people, rng)
        recent = [page, *recent[:19]]
        yield page


def _page(bodies: Sequence[Iterator[str]], people: Sequence[str], rng: Random) -> str:
    lines = rng.sample(HEADERS, 1)
    lines += [next(rng.choice(bodies)) for _ in range(rng.randrange(1, 4))]
    lines.insert(rng.randrange(1, len(lines)), rng.choice(NOTICES))
    if rng.random() < PERSONAL:
        lines.append(_contact(rng.choice(people), rng))

    if rng.random() < 0.3:
        lines[1] = "  " + lines[1].replace(" ", "  ", 2) + " &nbsp;"

    return "\n".join([*lines, rng.choice(FOOTERS)])


def _contact(name: str, rng: Random) -> str:
    return rng.choice(
        (
            f"Write to {name.lower()}{rng.randrange(100)}@example.com",
            f"Call {name} at (555) 01{rng.randrange(100):02d}-{rng.randrange(10000):04d}",
            f"Posted by {name} from 192.0.2.{rng.randrange(1, 255)}",
        )
    )


def _garbage(rng: Random) -> str:
    lines = []
    for _ in range(2):
        lines.append("".join(rng.choice(NOISE) for _ in range(rng.randrange(20, 60))))

    return "\n".join(lines)
