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
from llama2.results import DialogTurn, GhostExample, GhostResult
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_sampling
from llama2.stages.common.sampling import (
    Sample,
    answer,
    load_chat,
    open_records,
    sample_in_parts,
    seed_use,
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


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: the policy whole on every rank."""
    return plan_sampling([planned.shape(config.policy)], [], config.sample, cluster)


def run(config: Config, run: Run) -> None:
    """Write dialogs.jsonl: a dialog for every turn whose answer is learnt."""
    chat = load_chat(config.policy, config.sample, run)
    tally = run.tally("conversations")
    if config.conversations:
        conversations = read_conversations(config.conversations)
    else:
        conversations = compose(config, run.tally("questions"))

    conversations = conversations[: config.limit]
    most_turns = max((len(each.questions) for each in conversations), default=0)

    def work(part: Sequence[Conversation], first: int) -> list[list[str]]:
        return converse(chat, part, config, first)

    rows = sample_in_parts(run, [chat], "samples", conversations, work, config.sample, most_turns)
    generator = np.random.default_rng(seed_use(config.seed, "shortened"))
    written = turns = 0
    examples: list[GhostExample] = []

    with open_records(run.path / "dialogs.jsonl", run.ranks) as write:
        for conversation, answers in zip(conversations, rows, strict=True):
            short = generator.random() < config.shortened
            dialogs = make_dialogs(conversation, answers, config, short)
            for dialog in dialogs:
                write(dialog)

            for dialog in dialogs[: EXAMPLES - len(examples)]:
                examples.append(make_example(dialog))

            written += len(dialogs)
            turns += len(answers)
            _count(tally, conversation, answers, dialogs)

    run.write_result(
        GhostResult(
            conversations=len(conversations), dialogs=written, turns=turns, examples=examples
        )
    )


def make_example(dialog: Dialog) -> GhostExample:
    """Return a dialog as it is shown in the report."""
    turns = [DialogTurn(role=turn.role, content=turn.content) for turn in dialog.messages]
    return GhostExample(messages=turns)


def _count(
    tally: Tally, conversation: Conversation, answers: Sequence[str], dialogs: Sequence[Dialog]
) -> None:
    """Count a conversation: kept if it gives a dialog, cut if it ended before its last turn."""
    tally.read += 1
    if dialogs:
        tally.kept += 1
        tally.cut += len(answers) < len(conversation.questions)
    else:
        tally.skip(
            "it ended too early: no room, or an answer empty or cut off",
            "a larger sample.max_tokens or context, or fewer turns",
        )


# --- conversations ---
def read_conversations(path: Path) -> list[Conversation]:
    """Read conversations with instructions from the metadata of prompts."""
    conversations = []
    for prompt in records.read(Prompt, path):
        try:
            instruction = prompt.metadata["instruction"]
            text = str(instruction["text"])
            short = str(instruction.get("short") or text)
            questions = tuple(map(str, prompt.metadata["questions"]))
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: prompt '{prompt.id}' lacks metadata.questions or "
                "metadata.instruction.text",
                "Ghost Attention needs the user turns and an instruction (docs/formats.md)",
            ) from None

        conversations.append(Conversation(questions, text, short))

    return conversations


def compose(config: Config, tally: Tally) -> list[Conversation]:
    """Compose conversations of `turns` questions that have nothing to do with one another, under a
    random instruction.

    An instruction is a hobby, a language, a public figure, or two of them. The paper had its own
    model write the lists of hobbies and figures; here they are fixed. UserError where there are too
    few questions for one.
    """
    assert config.questions is not None
    generator = np.random.default_rng(seed_use(config.seed, "compose"))
    questions = list(_read_questions(config.questions, tally))
    if len(questions) < config.turns:
        raise UserError(
            f"{config.questions}: {len(questions)} questions for conversations of {config.turns} "
            f"turns ({tally.line()})",
            "give more questions, or fewer turns",
        )

    order = [questions[index] for index in generator.permutation(len(questions))]
    conversations = []
    for start in range(0, len(order) - config.turns + 1, config.turns):
        text, short = _draw_instruction(generator)
        turns = tuple(order[start : start + config.turns])
        conversations.append(Conversation(turns, text, short))

    return conversations


def _draw_instruction(generator: np.random.Generator) -> tuple[str, str]:
    """Draw one or two of a hobby, a language and a public figure; return the long and the short
    form."""
    hobby = generator.choice(HOBBIES)
    language = generator.choice(LANGUAGES)
    figure = generator.choice(FIGURES)
    texts = (f"Your hobby is {hobby}.", f"Always answer in {language}.", f"Act as {figure}.")
    shorts = (f"Hobby: {hobby}.", f"Language: {language}.", f"Figure: {figure}.")
    order = generator.permutation(3)
    drawn = order[: generator.integers(1, 3)]
    text = " ".join(texts[index] for index in drawn)
    short = " ".join(shorts[index] for index in drawn)
    return text, short


def _read_questions(path: Path, tally: Tally) -> Iterator[str]:
    """Yield what prompts of one turn ask that are not tagged for safety; the others are counted as
    left out."""
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


# --- sampling and training dialogs ---
def converse(
    chat: Chat, conversations: Sequence[Conversation], config: Config, first: int = 0
) -> list[list[str]]:
    """Return the answers of every turn, the instruction joined to each user message; all
    conversations go a turn at a time.

    `first` is the place of the first of them among all. A conversation ends early when the context
    is full or an answer is empty or cut off.
    """
    answers: list[list[str]] = [[] for _ in conversations]
    for turn in range(max((len(each.questions) for each in conversations), default=0)):
        prompts: dict[int, Messages] = {}
        for index, conversation in enumerate(conversations):
            if len(answers[index]) == turn < len(conversation.questions):
                messages = _make_prompt(conversation, answers[index])
                if chat.has_room(messages):
                    prompts[index] = messages

        rows = answer(
            chat,
            list(prompts.values()),
            config.sample,
            seed=seed_use(config.seed, "turn", turn),
            indices=[first + index for index in prompts],
        )
        for index, (reply,) in zip(prompts, rows):
            if reply.text and reply.completion.finish == "stop":
                answers[index].append(reply.text)

    return answers


def _make_prompt(conversation: Conversation, answers: Sequence[str]) -> Messages:
    """Return the dialog so far with the instruction on every user turn, waiting for the next
    answer."""
    turns: list[Message] = []
    for question, reply in zip(conversation.questions, [*answers, None]):
        turns.append(Message("user", f"{conversation.text} {question}"))
        if reply is not None:
            turns.append(Message("assistant", reply))

    return tuple(turns)


def make_dialogs(
    conversation: Conversation, answers: Sequence[str], config: Config, short: bool
) -> list[Dialog]:
    """Make a dialog for every turn from `first_depth` on: the instruction in the first turn, only
    the last answer learnt."""
    instruction = conversation.short if short else conversation.text
    questions = list(conversation.questions)
    questions[:1] = [f"{instruction} {opening}" for opening in questions[:1]]
    turns: list[Message] = []
    dialogs = []
    for question, reply in zip(questions, answers):
        turns += [Message("user", question), Message("assistant", reply)]
        depth = len(turns) // 2
        if depth >= config.first_depth:
            metadata = {"instruction": instruction, "depth": depth}
            dialogs.append(Dialog(tuple(turns), "last", metadata))

    return dialogs
