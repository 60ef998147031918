"""Two ranks sample and score what one would, from replicated or sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_ranks import together
from toys import CONFIG, VOCABULARY, llama

from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.generate.score import compute_logprobs, score_rows
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.train import parallel

ROWS = [[(7 * row + 3 * place) % VOCABULARY for place in range(3 + row)] for row in range(5)]
SAMPLING = Sampling(max_tokens=9, n=2, stop=(4, 5, 6), seed=3)


def sample_and_score(directory: Path, ranks: Ranks) -> None:
    alone = Engine(llama(), precision="fp32").generate(ROWS, SAMPLING)
    mine = ranks.share(range(len(ROWS)))
    for model in (llama(), parallel.shard(llama(), ranks)):
        engine = Engine(model, slots=2, precision="fp32")  # type: ignore[arg-type]
        together = ranks.unshare(engine.generate([ROWS[index] for index in mine], SAMPLING, mine))
        for row, expected in zip(together, alone, strict=True):
            assert [each.tokens for each in row] == [each.tokens for each in expected]

        nothing = engine.generate(ROWS[:1] if ranks.is_main else [], SAMPLING)
        assert len(nothing) == (1 if ranks.is_main else 0), (
            "a rank without prompts joins in the gathering"
        )

    with_one = [compute_logprobs(llama(), [row], "fp32", ranks=ranks)[0] for row in ROWS]
    scores = [score_rows(Scorer(CONFIG), [row], "fp32", ranks=ranks)[0] for row in ROWS]
    for tokens in (1, 14, 100):  # 5, 3 and 1 batches for two ranks
        sharded = parallel.shard(llama(), ranks), parallel.shard(Scorer(CONFIG), ranks)
        for found, expected in zip(
            compute_logprobs(sharded[0], ROWS, "fp32", tokens, ranks=ranks), with_one, strict=True
        ):  # type: ignore[arg-type]
            assert found == pytest.approx(expected, abs=1e-5)

        assert score_rows(sharded[1], ROWS, "fp32", tokens, ranks=ranks) == pytest.approx(
            scores, abs=1e-6
        )  # type: ignore[arg-type]


def test_two_ranks_sample_and_score_like_one(tmp_path: Path) -> None:
    together(sample_and_score, tmp_path / "work")
