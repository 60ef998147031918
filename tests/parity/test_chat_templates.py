"""Any chat template on both engines: ids against transformers, masks against the conversation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_formats import CONTROLS, TEMPLATES, make_byte_level, make_sentencepiece
from conversations import contents, conversations
from transformers import AutoTokenizer

from llama2.records import Messages, messages_of
from llama2.tokenizer import Tokenizer
from llama2.tokenizer.template import (
    encode_answered,
    encode_begun,
    encode_dialog,
    encode_prompt,
    find_ends,
)

CASES = [
    *(("byte-level", name) for name in TEMPLATES),
    # Llama 2's format has Meta's scheme there (test_template)
    *(("SentencePiece", name) for name in sorted(TEMPLATES.keys() - {"llama2"})),
    # as transformers writes Llama's tokenizers since `legacy` is false
    *(("SentencePiece, a space once", name) for name in ("chatml", "spaced", "zephyr")),
]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine, name = request.param
    path = tmp_path_factory.mktemp("chat")
    make = make_byte_level if engine == "byte-level" else make_sentencepiece
    tokenizer = make(path, TEMPLATES[name])
    if engine.endswith("once"):
        tokenizer.space_once = True
        tokenizer.save(path)

    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def typed(rows: Sequence[dict[str, str]]) -> Messages:
    return messages_of((row["role"], row["content"]) for row in rows)  # type: ignore[misc]


def spells_controls(tokenizer: Tokenizer, rows: Sequence[dict[str, str]]) -> bool:
    return any(name in row["content"] for row in rows for name in tokenizer.controls)


def test_ids_are_those_of_transformers(directory: Path, tokenizer: Tokenizer) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    compared = crossed = 0
    for rows in conversations(150):
        if spells_controls(tokenizer, rows):
            continue

        messages, asks = typed(rows), rows[-1]["role"] == "user"
        expected = theirs.apply_chat_template(rows, return_dict=False, add_generation_prompt=asks)
        ids = encode_prompt(tokenizer, messages) if asks else encode_dialog(tokenizer, messages)[0]
        compared += 1
        if ids != list(expected):
            # one token may run from the header into an answer that begins with a line end
            answers = [row["content"] for row in rows if row["role"] == "assistant"]
            assert any(answer[:1].isspace() for answer in answers)
            assert theirs.decode(ids) == theirs.decode(expected)
            crossed += 1

    assert compared > 100
    assert crossed <= 5


def adversarial(draw: random.Random, tokenizer: Tokenizer) -> str:
    """A text that spells markers, or begins or ends in the middle of one."""
    name = draw.choice([*CONTROLS, *tokenizer.controls])
    cut = draw.randrange(1, len(name))
    parts = [name, name[:cut], name[cut:], name.upper(), contents(draw), f" {name[cut:]}", "\n"]
    return "".join(draw.choices(parts, k=draw.randint(1, 4)))


def test_what_is_said_is_never_a_control_and_the_mask_is_the_answers(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    controls = set(tokenizer.controls.values())
    for _ in range(80):
        turns = [adversarial(draw, tokenizer) for _ in range(2 * draw.randint(1, 3))]
        rows = [("user", "assistant")[index % 2] for index in range(len(turns))]
        messages = messages_of(zip(rows, turns))  # type: ignore[arg-type]
        plain = messages_of((role, "mill") for role in rows)  # type: ignore[misc]

        ids, mask = encode_dialog(tokenizer, messages)
        markers = [token for token in ids if token in controls]
        ordinary = encode_dialog(tokenizer, plain)[0]
        assert markers == [token for token in ordinary if token in controls]

        spans = [list(group) for group in trained_runs(ids, mask)]
        answers = turns[1::2]
        assert len(spans) == len(answers)
        for span, answer in zip(spans, answers):
            assert span[-1] == find_ends(tokenizer)[0]
            said = tokenizer.decode([*tokenizer.encode("|"), *span]).removeprefix("|")
            assert said.strip() == answer.replace("\u2581", " ").strip()


def trained_runs(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained:
            if not index or not mask[index - 1]:
                runs.append([])

            runs[-1].append(token)

    return runs


def test_prompts_are_prefixes(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for rows in conversations(60, seed=2):
        if rows[-1]["role"] == "user":
            rows.append({"role": "assistant", "content": adversarial(draw, tokenizer)})

        messages = typed(rows)
        ids, mask = encode_dialog(tokenizer, messages)
        for end, message in enumerate(messages):
            if message.role == "assistant":
                before = encode_prompt(tokenizer, messages[:end])
                assert ids[: len(before)] == before
                assert mask[len(before)]

        prompt = encode_prompt(tokenizer, messages[:-1])
        assert encode_dialog(tokenizer, messages, "last") == (
            ids,
            [flag and index >= len(prompt) for index, flag in enumerate(mask)],
        )
        answered = encode_answered(tokenizer, messages)
        assert answered == ids[: len(answered)]
        assert mask[len(answered) - 1]
        assert not any(mask[len(answered) :])


def test_an_answer_that_is_begun_is_gone_on_with(tokenizer: Tokenizer) -> None:
    question = [("user", "How old is the mill?")]
    whole = messages_of([*question, ("assistant", "the old river runs")])  # type: ignore[list-item]
    for begun in ("the old", "the old  ", "the", "", " "):
        messages = messages_of([*question, ("assistant", begun)])  # type: ignore[list-item]
        ids = encode_begun(tokenizer, messages)
        assert ids == encode_dialog(tokenizer, whole)[0][: len(ids)]
        assert len(ids) >= len(encode_prompt(tokenizer, messages[:-1]))


def test_the_template_goes_out_as_it_came(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.template == tokenizer.template
    assert again.is_same(tokenizer)
    assert again.space_once == tokenizer.space_once
    assert find_ends(again) == find_ends(tokenizer)
