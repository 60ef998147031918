"""Two ranks ask a server for what one would: each for its own share, and any number of them goes on
with all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from test_ranks import together

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from completions_server import serving

from llama2.formats import checkpoint
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import RemoteEngine
from llama2.generate.sampling import Sampling
from llama2.ranks import Ranks
from llama2.records import Message
from llama2.tokenizer.tokenizer import Tokenizer

PROMPTS = [(Message("user", f"What is {number}?"),) for number in range(5)]
SAMPLING = Sampling(max_tokens=6, n=2, seed=3)


def answers(directory: Path, ranks: Ranks) -> list[list[tuple[int, ...]]]:
    tokenizer = Tokenizer.load(os.environ["POLICY"])
    engine = RemoteEngine(
        os.environ["SERVER"],
        "tiny",
        tokenizer=tokenizer,
        context=256,
        state=directory / "answers",
        rank=ranks.rank,
    )
    return [
        [one.completion.tokens for one in row]
        for row in Chat(engine, tokenizer, ranks).answer(PROMPTS, SAMPLING)
    ]


def shared(directory: Path, ranks: Ranks) -> None:
    found = answers(directory, ranks)
    assert (
        len((directory / f"answers/{ranks.rank}.jsonl").read_text().splitlines())
        == (6, 4)[ranks.rank]
    )
    assert all(rows == found for rows in ranks.gather([found]))


def test_each_rank_asks_for_its_share(
    tmp_path, policy, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Engine(checkpoint.load(policy).eval(), precision="fp32"), tokenizer) as server:
        monkeypatch.setenv("SERVER", server.url)
        monkeypatch.setenv("POLICY", str(policy))
        alone = answers(tmp_path / "alone", Ranks.alone())
        server.answered.clear()
        together(shared, tmp_path / "two")
        assert set(server.answered.values()) == {1}
        asked = len(server.asked)
        assert answers(tmp_path / "two", Ranks.alone()) == alone
        assert len(server.asked) == asked
