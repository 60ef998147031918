"""Ghost Attention (§3.3): dialogs that hold on to an instruction given once.

Sampling: the instruction is joined to *every* user message, so the newest model obeys it at each
turn. Training: it stays in the first user turn only, the loss on all earlier turns is zero, and
only the last answer is learnt (`Dialog.train = "last"`). Half of the instructions are shortened.
What is written feeds `sft`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from llama2 import records
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.generate.dialogue import Chat
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, Lineage, sampling_plan
from llama2.stages.common.sampling import (
    Sample,
    answer,
    derive_seed,
    load_chat,
    open_records,
    sample_in_parts,
)
from llama2.tally import Tally

EXAMPLES = 3


class Config(StageConfig):
    """Make Ghost Attention dialogs."""

    policy: Path
    """the newest model"""
    conversations: Path | None = None
    """JSONL of prompts whose metadata holds `questions` (the user turns) and `instruction` {text,
    short}"""
    questions: Path | None = None
    """instead: JSONL of any prompts; conversations are made of their questions and random
    instructions"""
    turns: int = Field(4, gt=0)
    """user turns of a conversation made from `questions`"""
    limit: int | None = Field(None, gt=0)
    """conversations; with `questions` as many as they yield unless given"""
    shortened: float = Field(0.5, ge=0, le=1)
    """share of training dialogs that carry the short form of their instruction"""
    first_depth: int = Field(1, gt=0)
    """the earliest turn whose answer is learnt; every later turn gives a dialog of its own"""
    sample: Sample = Sample(temperature=0.7)

    @model_validator(mode="after")
    def _one_of_both(self) -> Config:
        if (self.conversations is None) == (self.questions is None):
            raise ValueError("give either conversations or questions")

        return self


HOBBIES = (
    "chess",
    "gardening",
    "hiking",
    "painting",
    "photography",
    "cooking",
    "astronomy",
    "sailing",
    "pottery",
    "birdwatching",
    "cycling",
    "poetry",
)
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
FIGURES = (
    "Napoleon",
    "Marie Curie",
    "Leonardo da Vinci",
    "Cleopatra",
    "Isaac Newton",
    "Jane Austen",
    "Abraham Lincoln",
    "Ada Lovelace",
    "Galileo",
    "Florence Nightingale",
)


@dataclass(frozen=True)
class Conversation:
    """User turns and the instruction that should outlive them."""

    questions: tuple[str, ...]
    text: str
    short: str


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: the policy whole on every rank."""
    return sampling_plan([lineage.shape(config.policy)], [], config.sample, cluster)


def run(config: Config, run: Run) -> None:
    """Write dialogs.jsonl and summary.json."""
    chat = load_chat(config.policy, config.sample, run)
    tally = run.tally("conversations")
    conversations = (
        read(config.conversations)
        if config.conversations
        else compose(config, run.tally("questions"))
    )[: config.limit]
    turns = max((len(one.questions) for one in conversations), default=0)

    def work(some: Sequence[Conversation], first: int) -> list[list[str]]:
        return converse(chat, some, config, first)

    answers = sample_in_parts(run, [chat], "samples", conversations, work, config.sample, turns)
    generator = np.random.default_rng(derive_seed(config.seed, "shortened"))
    written, said = 0, 0
    examples: list[str] = []

    with open_records(run.path / "dialogs.jsonl", run.ranks) as put:
        for conversation, mine in zip(conversations, answers, strict=True):
            made = training_dialogs(
                conversation, mine, config, generator.random() < config.shortened
            )
            for one in made:
                put(one)
                examples += [records.to_json(one)] if len(examples) < EXAMPLES else []

            written, said = written + len(made), said + len(mine)
            _count(tally, conversation, mine, made)

    run.write_json(
        "summary.json",
        {
            "conversations": len(conversations),
            "dialogs": written,
            "turns": said,
            "examples": examples,
        },
    )


def _count(
    tally: Tally, conversation: Conversation, answers: Sequence[str], made: Sequence[Dialog]
) -> None:
    """Count a conversation: kept if it gives a dialog, cut if it ended before its last turn."""
    tally.read += 1
    if made:
        tally.kept += 1
        tally.cut += len(answers) < len(conversation.questions)
    else:
        tally.skip(
            "it ended too early: no room, or an answer empty or cut off",
            "a larger sample.max_tokens or context, or fewer turns",
        )


def read(path: Path) -> list[Conversation]:
    """Conversations with instructions."""
    found = []
    for prompt in records.read(Prompt, path):
        try:
            instruction = prompt.metadata["instruction"]
            found.append(
                Conversation(
                    tuple(map(str, prompt.metadata["questions"])),
                    str(instruction["text"]),
                    str(instruction.get("short") or instruction["text"]),
                )
            )
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: prompt '{prompt.id}' lacks metadata.questions or metadata.instruction.text",
                "Ghost Attention needs the user turns and an instruction (docs/formats.md)",
            ) from None

    return found


def compose(config: Config, tally: Tally) -> list[Conversation]:
    """Conversations of `turns` questions that have nothing to do with one another, under a random
    instruction.

    An instruction is a hobby, a language, a public figure, or two of them. The paper had its own
    model write the lists of hobbies and figures; here they are fixed. UserError where there are too
    few questions for one.
    """
    assert config.questions is not None
    generator = np.random.default_rng(derive_seed(config.seed, "compose"))
    asked = list(_questions(config.questions, tally))

    if len(asked) < config.turns:
        raise UserError(
            f"{config.questions}: {len(asked)} questions for conversations of {config.turns} turns "
            f"({tally.line()})",
            "give more questions, or fewer turns",
        )

    order = [asked[index] for index in generator.permutation(len(asked))]
    found = []
    for start in range(0, len(order) - config.turns + 1, config.turns):
        parts = [
            (f"Your hobby is {hobby}.", f"Hobby: {hobby}.") for hobby in [generator.choice(HOBBIES)]
        ]
        parts += [
            (f"Always answer in {language}.", f"Language: {language}.")
            for language in [generator.choice(LANGUAGES)]
        ]
        parts += [
            (f"Act as {figure}.", f"Figure: {figure}.") for figure in [generator.choice(FIGURES)]
        ]
        kept = [parts[index] for index in generator.permutation(3)[: generator.integers(1, 3)]]
        found.append(
            Conversation(
                tuple(order[start : start + config.turns]),
                " ".join(text for text, _ in kept),
                " ".join(short for _, short in kept),
            )
        )

    return found


def _questions(path: Path, tally: Tally) -> Iterator[str]:
    """What is asked in prompts of one turn that are not tagged for safety; the others are counted
    as left out."""
    for prompt in records.read(Prompt, path):
        tally.read += 1
        if prompt.safety:
            tally.skip("tagged for safety")
        elif len(prompt.messages) > 1:
            tally.skip("of several turns, or with a system turn")
        elif not prompt.messages[-1].content.strip():
            tally.skip("empty")
        else:
            tally.kept += 1
            yield prompt.messages[-1].content


def converse(
    chat: Chat, conversations: Sequence[Conversation], config: Config, first: int = 0
) -> list[list[str]]:
    """Answers of every turn, the instruction joined to each user message; all conversations go a
    turn at a time.

    `first` is the place of the first of them among all. A conversation ends early when the context
    is full or an answer is empty or cut off.
    """
    answers: list[list[str]] = [[] for _ in conversations]
    for turn in range(max((len(one.questions) for one in conversations), default=0)):
        talking = [
            index
            for index, one in enumerate(conversations)
            if len(answers[index]) == turn < len(one.questions)
        ]
        asked = {
            index: _sampling_messages(conversations[index], answers[index]) for index in talking
        }
        asked = {index: messages for index, messages in asked.items() if chat.has_room(messages)}
        found = answer(
            chat,
            list(asked.values()),
            config.sample,
            seed=derive_seed(config.seed, "turn", turn),
            indices=[first + index for index in asked],
        )

        for index, mine in zip(asked, found):
            if mine[0].text and mine[0].completion.finish == "stop":
                answers[index].append(mine[0].text)

    return answers


def _sampling_messages(conversation: Conversation, answers: Sequence[str]) -> Messages:
    """The dialog so far with the instruction on every user turn, waiting for the next answer."""
    turns: list[Message] = []
    for question, reply in zip(conversation.questions, [*answers, None]):
        turns.append(Message("user", f"{conversation.text} {question}"))
        if reply is not None:
            turns.append(Message("assistant", reply))

    return tuple(turns)


def training_dialogs(
    conversation: Conversation, answers: Sequence[str], config: Config, short: bool
) -> list[Dialog]:
    """A dialog for every turn from `first_depth` on: the instruction in the first turn, only the
    last answer learnt."""
    instruction = conversation.short if short else conversation.text
    turns: list[Message] = []
    dialogs = []

    for depth, (question, reply) in enumerate(zip(conversation.questions, answers), 1):
        turns += [
            Message("user", f"{instruction} {question}" if depth == 1 else question),
            Message("assistant", reply),
        ]
        if depth >= config.first_depth:
            dialogs.append(
                Dialog(tuple(turns), "last", {"instruction": instruction, "depth": depth})
            )

    return dialogs
