"""Conversations through an engine that says fixed tokens: template, stop ids, text and its
parts."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest
import torch

from llama2.generate.dialogue import Chat
from llama2.generate.generator import Completion, Tokens
from llama2.generate.sampling import Sampling
from llama2.ranks import Axis, Ranks
from llama2.records import Messages, messages_of
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train

T = TypeVar("T")
TALK = messages_of([("user", "the fox")])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(
        ["the quick brown fox jumps over the lazy dog " * 3] * 40,
        300,
        tmp_path_factory.mktemp("tokenizer"),
    )


class Fixed:
    """Says `tokens` up to the first stop id."""

    context = 1000

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.asked: list[int] = []

    def check(self, prompts: Sequence[Tokens]) -> None:
        self.asked.append(len(prompts))

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        said = tuple(self.stream((), sampling))
        finish = "stop" if said[-1] in sampling.stop else "length"
        assert indices is not None

        return [
            [Completion((*prompt, index), said, (0.0,) * len(said), finish)]  # type: ignore[arg-type]
            for prompt, index in zip(prompts, indices, strict=True)
        ]

    def update(self, weights: object) -> None:
        raise NotImplementedError

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        for token in self.tokens:
            yield token
            if token in sampling.stop:
                return


TEXTS = [
    "quick fox",
    "  jumps over \n\n the  dog \n ",
    "naïve 🦊, 犬!",
    "\n\tfox\n\n\n🦊 ",
    " ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_text_is_stripped_and_streams_in_parts(
    tokenizer: Tokenizer, text: str, ended: bool
) -> None:
    whole = text if ended else text + "x"
    chat = Chat(
        Fixed([*tokenizer.encode(whole), *([tokenizer.eos, 99] if ended else [])]), tokenizer
    )
    expected = whole.strip()
    ((answer,),) = chat.answer([TALK], Sampling())
    parts = list(chat.stream(TALK, Sampling()))
    assert answer.text == expected
    assert answer.completion.finish == ("stop" if ended else "length")
    assert "".join(parts) == expected
    assert all(parts), "no empty parts"
    assert "\ufffd" not in "".join(parts)


def test_parts_come_before_the_end(tokenizer: Tokenizer) -> None:
    chat = Chat(Fixed([*tokenizer.encode("fox dog fox dog"), tokenizer.eos]), tokenizer)
    assert len(list(chat.stream(TALK, Sampling()))) >= 4


def test_a_character_cut_short_by_the_limit_is_marked(tokenizer: Tokenizer) -> None:
    cut = tokenizer.encode("fox 🦊")[:-1]
    chat = Chat(Fixed(cut), tokenizer)
    ((answer,),) = chat.answer([TALK], Sampling())
    assert answer.text == "fox \ufffd"
    assert "".join(chat.stream(TALK, Sampling())) == answer.text


def test_other_stop_ids_are_kept_and_left_out_of_the_text(tokenizer: Tokenizer) -> None:
    fox, dog = (tokenizer.encode(word) for word in ("fox", "dog"))
    chat = Chat(Fixed([*fox, dog[-1], *fox]), tokenizer)
    ((answer,),) = chat.answer([TALK], Sampling(stop=(dog[-1],)))
    assert (answer.text, answer.completion.tokens) == ("fox", (*fox, dog[-1]))


class Apart(Ranks):
    """Ranks that share work and keep their own results."""

    def unshare(self, items: Sequence[T]) -> list[T]:
        return list(items)


def test_ranks_share_the_prompts_by_their_places(tokenizer: Tokenizer) -> None:
    engine = Fixed([4, tokenizer.eos])
    prompts: list[Messages] = [messages_of([("user", f"fox {index}")]) for index in range(5)]
    whole = Chat(engine, tokenizer).answer(prompts, Sampling())
    parts = []

    for rank in range(2):
        ranks = Apart(torch.device("cpu"), rank, 2, replicate=Axis(2, rank))
        parts.append(Chat(engine, tokenizer, ranks).answer(prompts, Sampling()))

    assert [parts[index % 2][index // 2] for index in range(5)] == whole
    assert [row[0].completion.prompt for row in whole] == [
        (*encode_prompt(tokenizer, messages), index) for index, messages in enumerate(prompts)
    ]
    assert engine.asked == [5, 5, 5], "every rank checks every prompt"


def test_every_end_of_the_model_ends_an_answer(tokenizer: Tokenizer) -> None:
    own = tokenizer.with_chat_template(None)
    own.stops = (tokenizer.eos, 290, 291)
    for end in own.stops:
        chat = Chat(Fixed([*tokenizer.encode("fox"), end, 5, 6]), own)
        ((answer,),) = chat.answer([TALK], Sampling())
        assert (answer.text, answer.completion.finish, answer.completion.tokens[-1]) == (
            "fox",
            "stop",
            end,
        )
        assert answer.completion.end_with(own.eos) == (*tokenizer.encode("fox"), tokenizer.eos)
        assert "".join(chat.stream(TALK, Sampling())) == "fox"
