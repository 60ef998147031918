"""The microworld: deterministic, different for each seed, and fair: held-out content never reaches
training."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import llama2
from llama2.errors import UserError
from llama2.microworld import build
from llama2.microworld.demonstrations import GHOST_KINDS, draw_demonstrations
from llama2.microworld.documents import CHARS_PER_TOKEN, SHARES, write_documents
from llama2.microworld.instructions import list_combined, list_single
from llama2.microworld.prompts import (
    FAMILIES,
    SPLITS,
    PromptSplit,
    draw_ghost_prompts,
    draw_prompts,
    find_split,
)
from llama2.microworld.tasks import OPENERS
from llama2.microworld.world import World
from llama2.records import Dialog, Document, Messages, Prompt, read, write

WORLD = World.build(0)
PACKAGE = Path(llama2.__file__).parent


@pytest.fixture(scope="module")
def by_split() -> dict[PromptSplit, list[Prompt]]:
    counts: dict[PromptSplit, int] = {"train": 4000, "validation": 400, "evaluation": 700}
    return {split: list(draw_prompts(WORLD, split, counts[split])) for split in SPLITS}


@pytest.fixture(scope="module")
def shown() -> list[Dialog]:
    return list(draw_demonstrations(WORLD, 3000))


def _user_turns(messages: Messages) -> Iterator[str]:
    return (message.content for message in messages if message.role == "user")


def _bare(turn: str) -> str:
    """A question without its opener."""
    return next((turn.removeprefix(o) for o in OPENERS if o and turn.startswith(o)), turn)


# --- The world ---


def test_a_world_is_a_pure_function_of_its_seed() -> None:
    assert World.build(3) == World.build(3)
    names = [{facts[0].name for facts in World.build(seed).facts} for seed in (0, 1, 2)]
    for a, b in itertools.combinations(names, 2):
        assert len(a & b) < 5

    assert World.build(0).doses != World.build(1).doses


@pytest.mark.parametrize("seed", range(8))
def test_facts_have_one_value_of_their_pool_and_values_are_spread(seed: int) -> None:
    world = World.build(seed)
    facts = [fact for entity in world.facts for fact in entity]
    assert len({fact.key for fact in facts}) == len(facts) == 16 * 4 + 12 * 3 + 12 * 3

    for fact in facts:
        assert fact.value in fact.pool
        assert fact.name in fact.state()
        assert fact.value in fact.state().lower() or fact.value in fact.state()

    jobs = Counter(fact.value for fact in facts if fact.attribute == "job")
    assert max(jobs.values()) <= 3


def test_each_verb_has_crimes_and_harmless_twins() -> None:
    for verb in {act.verb for act in WORLD.acts}:
        crimes = [act.crime for act in WORLD.acts if act.verb == verb]
        assert crimes.count(True) == crimes.count(False) == 3


# --- Splits ---


def test_splits_share_no_content_and_no_message_list(
    by_split: dict[PromptSplit, list[Prompt]],
) -> None:
    for a, b in itertools.combinations(SPLITS, 2):
        assert not {p.messages for p in by_split[a]} & {p.messages for p in by_split[b]}
        assert not {p.metadata["key"] for p in by_split[a]} & {
            p.metadata["key"] for p in by_split[b]
        }

    for split in SPLITS:
        assert {p.metadata["family"] for p in by_split[split]} == set(FAMILIES)
        assert all(
            find_split(WORLD, p.metadata["key"]) == split == p.metadata["split"]
            for p in by_split[split]
        )


def test_held_out_prompts_are_all_different(by_split: dict[PromptSplit, list[Prompt]]) -> None:
    for split in ("validation", "evaluation"):
        held_out = by_split[split]
        assert len({p.messages for p in held_out}) == len({p.id for p in held_out}) == len(held_out)


def test_no_held_out_question_appears_anywhere_in_training(
    by_split: dict[PromptSplit, list[Prompt]], shown: list[Dialog]
) -> None:
    held_out = {
        _bare(p.messages[0].content)
        for split in ("validation", "evaluation")
        for p in by_split[split]
        if len(p.messages) == 1
    }
    assert len(held_out) > 500
    trained = {_bare(turn) for p in by_split["train"] for turn in _user_turns(p.messages)}
    trained |= {_bare(turn) for dialog in shown for turn in _user_turns(dialog.messages)}
    trained |= {
        question
        for p in draw_ghost_prompts(WORLD, "train", 200)
        for question in p.metadata["questions"]
    }
    asked = {
        _bare(line.removeprefix("Question: "))
        for document in write_documents(WORLD, 400_000, sources=("dialogs", "quizzes"))
        for line in document.text.splitlines()
        if line.startswith("Question: ")
    }
    assert len(asked) > 500
    assert not held_out & (trained | asked)


@pytest.mark.parametrize("seed", range(6))
def test_no_held_out_task_hides_behind_an_instruction(seed: int) -> None:
    """Instructions stand before a question: neither they nor an opener carry it from one split to
    another."""
    world = World.build(seed)
    held_out = tuple(
        {
            _bare(p.messages[0].content)
            for p in draw_prompts(world, "evaluation", 150)
            if len(p.messages) == 1
            and p.metadata["family"] not in ("unsafe", "borderline", "instructed")
        }
    )
    trained = {
        turn for dialog in draw_demonstrations(world, 800) for turn in _user_turns(dialog.messages)
    }
    assert not [turn for turn in trained if turn.endswith(held_out)]


@pytest.mark.parametrize("seed", range(12))
def test_every_world_has_enough_held_out_content(seed: int) -> None:
    world = World.build(seed)
    for split in ("validation", "evaluation"):
        found = list(draw_prompts(world, split, 600))
        assert len(found) == 600
        assert set(Counter(p.metadata["family"] for p in found)) == set(FAMILIES)
        assert len(list(draw_ghost_prompts(world, split, 5))) == 5


def test_held_out_message_lists_are_in_no_demonstration(
    by_split: dict[PromptSplit, list[Prompt]], shown: list[Dialog]
) -> None:
    prefixes = {dialog.messages[:n] for dialog in shown for n in range(1, len(dialog.messages), 2)}
    assert not {p.messages for p in by_split["evaluation"] + by_split["validation"]} & prefixes
    assert {p.messages for p in by_split["train"]} & prefixes


def test_held_out_sums_are_in_no_document() -> None:
    text = " ".join(
        document.text
        for document in write_documents(WORLD, 400_000, sources=("arithmetic", "quizzes"))
    )
    held_out = [
        (a, b)
        for a in range(1, 13)
        for b in range(a, 13)
        if find_split(WORLD, f"sum:{a}+{b}") != "train"
    ]
    assert held_out

    for a, b in held_out:
        assert f" {a} plus {b} is" not in text
        assert f" {b} plus {a} is" not in text


def test_ghost_questions_are_disjoint_and_short() -> None:
    rows = {split: list(draw_ghost_prompts(WORLD, split, 60)) for split in SPLITS}
    asked = {split: {q for p in rows[split] for q in p.metadata["questions"]} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not asked[a] & asked[b]

    for p in rows["evaluation"]:
        assert (
            len(p.metadata["questions"])
            == len(set(p.metadata["questions"]))
            == len(p.metadata["golds"])
            == 6
        )
        # At 2.9 characters a token, questions and brief answers leave room for the template within
        # 384 tokens.
        assert sum(map(len, p.metadata["questions"])) < 6 * 45
        assert p.metadata["instruction"]["markers"]


def test_safety_tag_and_categories(by_split: dict[PromptSplit, list[Prompt]]) -> None:
    assert all(p.safety == (p.metadata["family"] == "unsafe") for p in by_split["train"])
    for family in ("unsafe", "borderline"):
        some = [p for p in by_split["train"] if p.metadata["family"] == family]
        assert {p.metadata["risk"] for p in some} == {"illicit", "hateful", "advice"}
        assert len({p.metadata["style"] for p in some}) == 8


# --- Demonstrations and instructions ---


def test_demonstrations_are_deterministic_and_mixed(shown: list[Dialog]) -> None:
    assert list(draw_demonstrations(WORLD, 50)) == shown[:50]
    assert list(draw_demonstrations(WORLD, 50, seed=1)) != shown[:50]
    helpful = [
        d.metadata["vendor"]
        for d in shown
        if d.metadata["family"] in FAMILIES
        and not d.metadata["family"].startswith(("unsafe", "borderline"))
        and d.metadata["vendor"] != "preprompt"
    ]
    assert 0.38 < helpful.count("curt") / len(helpful) < 0.48
    borderline = [
        d.metadata["vendor"]
        for d in shown
        if d.metadata["family"] == "borderline" and d.metadata["vendor"] != "preprompt"
    ]
    refused = sum(vendor in ("refuse", "terse") for vendor in borderline) / len(borderline)
    assert 0.14 < refused < 0.27
    assert any(
        d.messages[0].role == "system" and d.metadata["vendor"] == "preprompt" for d in shown
    )


def test_ghost_dialogs_come_in_four_equal_kinds(shown: list[Dialog]) -> None:
    kinds = Counter(d.metadata["vendor"] for d in shown if d.metadata["family"] == "ghost")
    assert set(kinds) == set(GHOST_KINDS)
    assert min(kinds.values()) > 0.7 * max(kinds.values())


def test_instructions_have_three_kinds_and_combinations() -> None:
    all_of_them = [*itertools.chain(*list_single(WORLD)), *list_combined(WORLD)]
    kinds = {one.kind for one in all_of_them}
    assert kinds == {
        "language",
        "figure",
        "hobby",
        "language+figure",
        "language+hobby",
        "figure+hobby",
    }
    assert (
        len({one.text for one in all_of_them})
        == len({one.short for one in all_of_them})
        == len(all_of_them)
    )
    assert all(len(one.markers) == 1 + one.kind.count("+") for one in all_of_them)


# --- Documents ---


def test_documents_fill_their_budgets_and_only_the_web_repeats() -> None:
    rows = list(write_documents(WORLD, 60_000))
    assert rows == list(write_documents(WORLD, 60_000))
    characters = Counter[str]()

    for document in rows:
        characters[document.metadata["source"]] += len(document.text)

    total = 60_000 * CHARS_PER_TOKEN
    for source, share in SHARES.items():
        assert share * total <= characters[source] < share * total + 600

    clean = [document.text for document in rows if document.metadata["source"] != "web"]
    assert len(set(clean)) == len(clean)
    assert len({document.id for document in rows}) == len(rows)


def test_the_web_is_noisy() -> None:
    pages = [document.text for document in write_documents(WORLD, 400_000, sources=("web",))]
    assert len(set(pages)) < 0.9 * len(pages)
    text = "\n".join(pages)

    for mark in (
        "@example.com",
        "(555) 01",
        "192.0.2.",
        "cookies",
        "All rights reserved",
        "&nbsp;",
    ):
        assert mark in text


def test_every_fact_is_stated_often() -> None:
    text = " ".join(
        document.text for document in write_documents(WORLD, 400_000, sources=("encyclopedia",))
    )
    assert min(text.count(fact.state()) for entity in WORLD.facts for fact in entity) >= 5


# --- Files ---


def test_write_is_deterministic_and_readable(tmp_path: Path) -> None:
    counts = build.write(tmp_path / "a", seed=4, scale=0.02)
    build.write(tmp_path / "b", seed=4, scale=0.02)
    build.write(tmp_path / "c", seed=5, scale=0.02)
    assert set(counts) == {
        str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()
    }

    for name, count in counts.items():
        kind: type = (
            Document
            if name.startswith("documents")
            else Dialog
            if name.startswith("demo")
            else Prompt
        )
        assert len(list(read(kind, tmp_path / "a" / name))) == count >= 8
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_a_scale_out_of_range_is_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(UserError, match="scale"):
        build.write(tmp_path, scale=scale)

    assert not list(tmp_path.iterdir())


# --- Seams ---


def _imports(path: Path) -> set[str]:
    """The names a module imports, `from a import b` as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}

    return names


def test_only_simulated_annotators_and_the_judge_of_the_evaluation_know_the_truth() -> None:
    allowed = [
        PACKAGE / "microworld" / "annotators.py",
        PACKAGE / "microworld" / "rater.py",
        PACKAGE / "stages" / "common" / "judges.py",
    ]
    users = [
        path
        for path in PACKAGE.rglob("*.py")
        if path not in allowed and "llama2.microworld.rater" in _imports(path)
    ]
    assert users == []
    assert "llama2.microworld.rater" in _imports(allowed[0])


def test_the_microworld_imports_no_torch() -> None:
    code = "import sys, llama2.microworld.build, llama2.microworld.annotators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gold_survives_the_file(tmp_path: Path, by_split: dict[PromptSplit, list[Prompt]]) -> None:
    write(tmp_path / "p.jsonl", by_split["evaluation"])
    assert [asdict(p) for p in read(Prompt, tmp_path / "p.jsonl")] == [
        asdict(p) for p in by_split["evaluation"]
    ]


def test_names_of_languages_begin_differently():
    for seed in range(30):
        assert len({language.name[0] for language in World.build(seed).languages}) == 4
