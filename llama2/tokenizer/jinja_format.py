"""Conversations in the format that a checkpoint's own chat template writes.

The rendered text is cut at its markers, which become control ids, and the pieces between them are
encoded as text. So the ids are those of transformers' `apply_chat_template`, but for two things.
What a message spells of a marker stays text. And prompt and answer are encoded apart where the
answer begins, as the model sees it when it answers: a token that would run across (a line end of
the header and one of the answer, say) is two.

The loss mask comes from the template: from its `{% generation %}` marks, or from what it adds when
an answer is added. An answer ends with the first marker behind it. A template that writes earlier
turns otherwise once a later one is there cannot be learnt from so, and is refused by turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from llama2.errors import UserError
from llama2.records import Message, Messages, Train, check_roles, mask_turns
from llama2.tokenizer.jinja_template import (
    Rendered,
    Span,
    TemplateFault,
    has_generation,
    make_seal,
    render,
)
from llama2.tokenizer.llama2_format import CHAT_TEMPLATE
from llama2.tokenizer.said import Seal

if TYPE_CHECKING:
    from llama2.tokenizer.tokenizer import Tokenizer

MEND = (
    "mend the template, or give another: `llama2 import` and `llama2 sft` have --chat-template "
    "FILE, llama2, chatml or zephyr"
)
_ANCHOR = "\U0010fffd"  # in front of text that goes on, where a tokenizer puts a space in front


@dataclass(frozen=True)
class Writer:
    """A tokenizer's template, at work on one conversation."""

    tokenizer: Tokenizer
    source: str
    names: dict[str, str]
    seal: Seal

    @classmethod
    def of(cls, tokenizer: Tokenizer, messages: Messages) -> Writer:
        """Return the writer of a tokenizer; Llama 2's format if it has no template."""
        source = CHAT_TEMPLATE if tokenizer.template is None else tokenizer.template
        names = _list_names(tokenizer)
        return cls(
            tokenizer, source, names, make_seal(source, messages, names, [*tokenizer.controls])
        )

    @property
    def place(self) -> str:
        """Return where the template stands."""
        return self.tokenizer.template_place or "the chat template"

    def render(self, messages: Messages, *, prompt: bool = False, begun: bool = False) -> Rendered:
        """Render a conversation; UserError for a template that cannot, or drops the system turn."""
        try:
            rendered = render(
                self.source, messages, self.names, self.seal, prompt=prompt, begun=begun
            )
        except TemplateFault as fault:
            raise self._explain(messages, str(fault)) from None

        if messages[0].role == "system" and not _shows(rendered, messages[0].content):
            raise self._refuse_system("it leaves it out")

        return rendered

    def _explain(self, messages: Messages, fault: str) -> UserError:
        """Return the error for a failure; of one that the system turn alone causes, its own."""
        if messages[0].role == "system" and len(messages) > 1:
            try:
                render(self.source, messages[1:], self.names, self.seal)
            except TemplateFault:
                pass
            else:
                return self._refuse_system(fault)

        return UserError(f"{self.place}: the chat template fails: {fault}", MEND)

    def _refuse_system(self, reason: str) -> UserError:
        return UserError(
            f"{self.place}: the chat template has no place for a system turn ({reason})",
            "write it into the first user turn, or give a template that has one (--chat-template)",
        )

    def find_prompts(self, messages: Messages, full: Rendered) -> dict[int, int | None]:
        """Return for each answer where it begins in the whole text; None where the template writes
        what comes before it otherwise in the end."""
        begins: dict[int, int | None] = {}
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before = self.render(messages[:index], prompt=True).text
                begins[index] = len(before) if full.text.startswith(before) else None

        return begins

    # --- ids ---
    def encode(self, text: str, cuts: Sequence[int] = ()) -> list[tuple[Span, list[int]]]:
        """Return the pieces of a rendered text with their ids; none runs across one of `cuts`."""
        pieces: list[tuple[Span, list[int]]] = []
        start = 0
        for match in self.seal.markers.pattern.finditer(text):
            pieces += self._encode_plain(text, (start, match.start()), cuts)
            pieces.append((match.span(), [self.tokenizer.controls[match[0]]]))
            start = match.end()

        return [*pieces, *self._encode_plain(text, (start, len(text)), cuts)]

    def join(self, text: str, begins: Mapping[int, int | None]) -> list[int]:
        """Return the ids of a rendered text whose answers begin there."""
        cuts = [begin for begin in begins.values() if begin is not None]
        return [token for _, part in self.encode(text, cuts) for token in part]

    def _encode_plain(
        self, text: str, span: Span, cuts: Sequence[int]
    ) -> list[tuple[Span, list[int]]]:
        """Encode the text between two markers."""
        begin, end = span
        places = [begin, *sorted({cut for cut in cuts if begin < cut < end}), end]
        pieces = []
        # a text that begins with a space gets no other, where only the beginning gets one
        begun = self.tokenizer.space_once and (begin > 0 or text.startswith(" "))
        for first, last in pairwise(places):
            part = self.seal.remove(text[first:last])
            if part:
                ids = self._go_on(part) if begun else self.tokenizer.encode(part)
                pieces.append(((first, last), ids))
                begun = True

        return pieces

    def _go_on(self, text: str) -> list[int]:
        """Encode text that stands right behind other text."""
        if not self.tokenizer.dummy_prefix:
            return self.tokenizer.encode(text)

        before = self.tokenizer.encode(_ANCHOR)
        return self.tokenizer.encode(_ANCHOR + text)[len(before) :]

    # --- answers ---
    def find_answers(
        self, messages: Messages, full: Rendered, begins: dict[int, int | None], train: Train
    ) -> list[Span]:
        """Return the places of the answers that are learnt, with what ends each.

        UserError for a template that writes one otherwise in the end, or nothing behind it.
        """
        places = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
        flags = mask_turns(messages, train)
        chosen = [index for index, flag in zip(places, flags, strict=True) if flag]
        if has_generation(self.source):
            return self._find_marked(full, places, chosen)

        spans = []
        for index in chosen:
            number = places.index(index) + 1
            begin = begins[index]
            if begin is None:
                raise self.refuse_mask(number, "what comes before it")

            before = full if index == len(messages) - 1 else self.render(messages[: index + 1])
            marker = self.find_marker(before, messages[index], begin)
            if marker is None:
                raise UserError(
                    f"{self.place}: the chat template writes no control token behind answer "
                    f"{number}, so a model could not learn to end one",
                    "give a template that writes one, such as eos_token, behind each answer "
                    "(--chat-template)",
                )
            if not full.text.startswith(before.text[: marker.end()]):
                raise self.refuse_mask(number, "it")

            spans.append((begin, marker.end()))

        return spans

    def _find_marked(
        self, full: Rendered, places: Sequence[int], chosen: Sequence[int]
    ) -> list[Span]:
        """Return the places that the template marks, of the chosen answers."""
        marked = full.generated
        if len(marked) != len(places):
            raise UserError(
                f"{self.place}: the chat template marks {len(marked)} places as generated, the "
                f"conversation has {len(places)} answers",
                "each answer needs one {% generation %} block",
            )

        spans = []
        for index in chosen:
            begin, end = marked[places.index(index)]
            behind = self.seal.markers.pattern.match(full.text, end)
            ends = self.seal.markers.pattern.findall(full.text[begin:end])
            spans.append((begin, behind.end() if behind and not ends else end))

        return spans

    def find_marker(self, rendered: Rendered, answer: Message, begin: int) -> re.Match[str] | None:
        """Return the first marker behind an answer that begins at `begin`; None without one."""
        content = self.seal.put(answer.content.strip())
        place = rendered.text.find(content, begin)
        markers = [
            match
            for match in self.seal.markers.pattern.finditer(rendered.text)
            if match.start() >= max(begin, place + len(content))
        ]
        if not markers:
            return None

        return markers[0] if place >= 0 else markers[-1]  # parts of it may stand elsewhere

    def refuse_mask(self, number: int, what: str) -> UserError:
        """Return the error for a template that writes the turn of an answer otherwise later."""
        return UserError(
            f"{self.place}: the chat template writes answer {number}, or what comes before it, "
            "otherwise once the conversation goes on, so what the model says cannot be told from "
            f"what it reads ({what} is no beginning of the whole)",
            'learn the last answer alone ("train": "last"), or give a template that marks answers '
            "by {% generation %}",
        )


def _list_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokens that a template may write by name, as transformers hands them over."""
    names = {"eos_token": tokenizer.name_of(tokenizer.announced_eos)}
    if tokenizer.has_bos:
        names["bos_token"] = tokenizer.name_of(tokenizer.bos)

    return names


def _shows(rendered: Rendered, text: str) -> bool:
    """Return whether a text stands in what was rendered, however it is laid out."""
    wanted = "".join(text.split()).casefold()
    return wanted in "".join(rendered.seal.remove(rendered.text).split()).casefold()


# --- entrances ---
def encode_dialog(
    tokenizer: Tokenizer, messages: Messages, train: Train = "all"
) -> tuple[list[int], list[bool]]:
    """Return the ids of a finished conversation, and its loss mask of the same length."""
    check_roles(messages, last="assistant")
    writer = Writer.of(tokenizer, messages)
    full = writer.render(messages)
    begins = writer.find_prompts(messages, full)
    spans = writer.find_answers(messages, full, begins, train)
    cuts = [begin for begin in begins.values() if begin is not None]
    cuts += [place for span in spans for place in span]

    ids: list[int] = []
    mask: list[bool] = []
    for (first, last), part in writer.encode(full.text, cuts):
        ids += part
        mask += [any(begin <= first and last <= end for begin, end in spans)] * len(part)

    return ids, mask


def encode_answered(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation up to what ends its last answer."""
    check_roles(messages, last="assistant")
    writer = Writer.of(tokenizer, messages)
    full = writer.render(messages)
    begins = writer.find_prompts(messages, full)
    last = begins[len(messages) - 1] or 0
    marker = writer.find_marker(full, messages[-1], last)
    end = len(full.text) if marker is None else marker.end()
    return writer.join(full.text[:end], begins)


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation that waits for its answer, with the answer's header."""
    check_roles(messages, last="user")
    writer = Writer.of(tokenizer, messages)
    full = writer.render(messages, prompt=True)
    return writer.join(full.text, writer.find_prompts(messages, full))


def encode_begun(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation whose last turn is the beginning of an answer."""
    check_roles(messages, last="assistant")
    begun = messages[-1].content.rstrip(" ")
    if not begun.strip():
        return encode_prompt(tokenizer, messages[:-1])

    messages = (*messages[:-1], Message("assistant", begun))
    writer = Writer.of(tokenizer, messages)
    text, end, _ = writer.render(messages, begun=True).text.rpartition(writer.seal.end)
    begins = writer.find_prompts(messages, Rendered(text, writer.seal, ()))
    if not end or begins[len(messages) - 1] is None:
        raise UserError(
            f"{writer.place}: the chat template does not let an answer begin and go on",
            "ask for a whole answer",
        )

    return writer.join(text, begins)


# --- what a template can do ---
def check(tokenizer: Tokenizer, with_system: bool = False) -> None:
    """UserError for a template that cannot ask a model anything, or not under a system turn."""
    question = (Message("user", "Is anybody there?"),)
    writer = Writer.of(tokenizer, question)
    if not _shows(writer.render(question, prompt=True), question[0].content):
        raise UserError(
            f"{writer.place}: the chat template does not write what the user says", MEND
        )

    _check_header(tokenizer)
    if with_system:
        writer.render((Message("system", "Answer in a word."), *question), prompt=True)


def _check_header(tokenizer: Tokenizer) -> None:
    """UserError for a template that writes a header in front of an answer and none where it is
    asked for one: the model would have to say it itself."""
    question, answer = Message("user", "Is anybody there?"), Message("assistant", "Somebody is.")
    writer = Writer.of(tokenizer, (question, answer))
    before = writer.render((question,), prompt=True).text
    plain = writer.render((question,)).text
    full = writer.render((question, answer)).text
    place = full.find(answer.content)
    header = full[len(before) : place].strip()
    if before == plain and full.startswith(before) and header:
        raise UserError(
            f"{writer.place}: the chat template writes {header!r} in "
            "front of an answer, and not where one is asked for",
            "have it write that at its end if add_generation_prompt is true",
        )


def find_end(tokenizer: Tokenizer) -> int | None:
    """Return the id of the control that a template writes behind an answer; None if it writes
    none."""
    talk = (Message("user", "Is anybody there?"), Message("assistant", "Somebody is."))
    writer = Writer.of(tokenizer, talk)
    marker = writer.find_marker(writer.render(talk), talk[-1], 0)
    return None if marker is None else tokenizer.controls[marker[0]]
