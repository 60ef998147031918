"""Ghost Attention (§3.3): dialogs that hold on to an instruction given once.

Sampling: the instruction is joined to *every* user message, so the newest model obeys it at each
turn. Training: it stays in the first user turn only, the loss on all earlier turns is zero, and
only the last answer is learnt (`Dialog.train = "last"`). Half of the instructions are shortened.
What is written feeds `sft`.

Where a program can check the instruction in the text (`evaluate/constraints.py`), `tries`, `begin`
and `keep` lead to answers that obey; the paper has none of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from llama2 import records
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.evaluate.constraints import obeys_all, read_checks
from llama2.evaluate.winrate import measure_share
from llama2.generate.dialogue import Answer, Chat
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.results import DialogTurn, GhostExample, GhostResult, Proportion
from llama2.runs import Run
from llama2.stages.common.instructions import Conversation, Kind, compose
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
_SENTENCES = re.compile(r".*[^\W\d][.!?…][\"'”’)]*(?=\s|$)", re.DOTALL)
"""all up to the last mark behind a word"""


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
    instructions: tuple[Kind, ...] | None = None
    """with `questions`: kinds of instructions to draw, such that a program can check them in the
    text; without any, hobbies, languages and figures in the paper's words"""
    tries: int | None = Field(None, gt=0)
    """answers sampled a turn, of which the first is taken that obeys (an addition to the paper,
    which takes one); needs instructions that can be checked"""
    begin: bool = False
    """begin each answer with the words that its instruction asks for at the start, and let the
    policy go on: what many `tries` would find (an addition to the paper); needs instructions that
    can be checked"""
    unfinished: Literal["trim"] | None = None
    """trim: an answer that was cut off stays up to its last whole sentence (an addition to the
    paper); else it ends its conversation"""
    keep: Literal["adherent"] | None = None
    """end a conversation before its first answer that disobeys (an addition to the paper, which
    keeps all); needs instructions that can be checked"""
    sample: Sample = Sample(temperature=0.7)

    @model_validator(mode="after")
    def _one_of_both(self) -> Config:
        if (self.conversations is None) == (self.questions is None):
            raise ValueError("give either conversations or questions")
        if self.instructions is not None and self.questions is None:
            raise ValueError("instructions are drawn for questions; conversations bring their own")

        return self


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
        assert config.questions is not None
        tally_questions = run.tally("questions")
        conversations = compose(
            config.questions, config.turns, config.instructions, config.seed, tally_questions
        )

    conversations = conversations[: config.limit]
    check_checks(config, conversations)
    most_turns = max((len(each.questions) for each in conversations), default=0)

    def work(part: Sequence[Conversation], first: int) -> list[list[str]]:
        return converse(chat, part, config, first)

    rows = sample_in_parts(run, [chat], "samples", conversations, work, config.sample, most_turns)
    generator = np.random.default_rng(seed_use(config.seed, "shortened"))
    written = turns = 0
    adherence: list[bool] = []
    examples: list[GhostExample] = []

    with open_records(run.path / "dialogs.jsonl", run.ranks) as write:
        for conversation, answers in zip(conversations, rows, strict=True):
            short = generator.random() < config.shortened
            obeyed = count_obeyed(conversation, answers)
            adherence += check_turns(conversation, answers)
            if config.keep:
                answers = answers[:obeyed]

            dialogs = make_dialogs(conversation, answers, config, short)
            for dialog in dialogs:
                write(dialog)

            for dialog in dialogs[: EXAMPLES - len(examples)]:
                examples.append(make_example(dialog))

            written += len(dialogs)
            turns += len(answers)
            _count(tally, conversation, answers, dialogs)

    share = measure_share(sum(adherence), len(adherence)) if adherence else None
    run.write_result(
        GhostResult(
            conversations=len(conversations),
            dialogs=written,
            turns=turns,
            adherence=share,
            examples=examples,
        )
    )
    if share is not None:
        run.conclude(describe_adherence(share))


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
            "it ended too early: no room, or an answer empty, cut off or disobedient",
            "a larger sample.max_tokens or context, or fewer turns",
        )


def describe_adherence(share: Proportion) -> str:
    """Say how often sampled answers obeyed, before any was left out."""
    bounds = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
    return f"{100 * (share.rate or 0):.1f} % {bounds} of {share.n:,} sampled answers obey"


# --- conversations ---
def read_conversations(path: Path) -> list[Conversation]:
    """Read conversations with instructions from the metadata of prompts."""
    conversations = []
    for prompt in records.read(Prompt, path):
        try:
            instruction = prompt.metadata["instruction"]
            text = str(instruction["text"])
            short = str(instruction.get("short") or text)
            kind = str(instruction.get("kind") or "")
            questions = tuple(map(str, prompt.metadata["questions"]))
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: prompt '{prompt.id}' lacks metadata.questions or "
                "metadata.instruction.text",
                "Ghost Attention needs the user turns and an instruction (docs/formats.md)",
            ) from None

        where = f"{path}: prompt '{prompt.id}'"
        checks = read_checks(instruction.get("checks") or [], where)
        conversations.append(Conversation(questions, text, short, checks, kind))

    return conversations


def check_checks(config: Config, conversations: Sequence[Conversation]) -> None:
    """UserError where answers are to obey and an instruction has no checks."""
    if not (config.keep or config.tries or config.begin):
        return

    for conversation in conversations:
        if not conversation.checks:
            raise UserError(
                f"keep, tries and begin go by what can be checked, and of '{conversation.text}' "
                "nothing can",
                "draw instructions of kinds (--instructions language greeting), give "
                "metadata.instruction.checks (docs/evaluation.md), or leave both out",
            )


def check_turns(conversation: Conversation, answers: Sequence[str]) -> list[bool]:
    """Return for each answer whether it obeys; nothing where that cannot be checked."""
    if not conversation.checks:
        return []

    pairs = zip(conversation.questions, answers)
    return [obeys_all(conversation.checks, question, answer) for question, answer in pairs]


def count_obeyed(conversation: Conversation, answers: Sequence[str]) -> int:
    """Return how many answers obey before the first that does not."""
    marks = check_turns(conversation, answers)
    return marks.index(False) if False in marks else len(marks)


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
                begin = find_beginning(conversation, config)
                messages = _make_prompt(conversation, answers[index], begin)
                if chat.has_room(messages):
                    prompts[index] = messages

        rows = answer(
            chat,
            list(prompts.values()),
            config.sample,
            n=config.tries or 1,
            seed=seed_use(config.seed, "turn", turn),
            indices=[first + index for index in prompts],
        )
        for index, replies in zip(prompts, rows):
            begin = find_beginning(conversations[index], config)
            texts = [read_reply(reply, config, begin) for reply in replies]
            text = choose_reply(conversations[index], turn, texts)
            if text:
                answers[index].append(text)

    return answers


def find_beginning(conversation: Conversation, config: Config) -> str:
    """Return the words that every answer is begun with; nothing where none are asked for."""
    if not config.begin:
        return ""

    starts = [check.argument for check in conversation.checks if check.name == "starts"]
    return " ".join(starts[:1])


def read_reply(reply: Answer, config: Config, begin: str = "") -> str:
    """Return the text of a reply behind its beginning; of one that was cut off the whole sentences,
    if that is asked for, and else nothing."""
    text = reply.text
    if reply.completion.finish != "stop":
        sentences = _SENTENCES.match(text) if config.unfinished else None
        text = sentences[0] if sentences else ""

    return f"{begin} {text}" if begin and text else text


def choose_reply(conversation: Conversation, turn: int, replies: Sequence[str]) -> str:
    """Return the first reply that obeys, else the first that is not empty, else nothing."""
    for reply in replies if len(replies) > 1 else ():
        if obeys_all(conversation.checks, conversation.questions[turn], reply):
            return reply

    return next(filter(None, replies), "")


def _make_prompt(conversation: Conversation, answers: Sequence[str], begin: str = "") -> Messages:
    """Return the dialog so far with the instruction on every user turn, waiting for the next
    answer, or for what follows its beginning."""
    turns: list[Message] = []
    for question, reply in zip(conversation.questions, [*answers, begin]):
        turns.append(Message("user", f"{conversation.text} {question}"))
        turns.append(Message("assistant", reply))

    return tuple(turns if begin else turns[:-1])


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
