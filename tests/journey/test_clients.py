"""Others' clients against a real server: what their own test suites do with one.

LLAMA2_PEER_CLIENTS is an interpreter with lm-eval, langchain-openai and
llama-index-llms-openai-like (`make peers` builds one). Without it, these are skipped; openai's
client is tested always, in test_serve.py and others beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from servers import serving

from llama2 import records
from llama2.records import Prompt

PYTHON = os.environ.get("LLAMA2_PEER_CLIENTS")
SCRIPTS = Path(__file__).parents[1] / "clients"
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="LLAMA2_PEER_CLIENTS names no interpreter"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def served(policy):
    with serving(policy, slots=8) as running:
        yield running


def ask(script: str, *words: object) -> list[str]:
    """What a script prints under the peers' interpreter; it must end well."""
    assert PYTHON
    done = subprocess.run(
        [PYTHON, str(SCRIPTS / script), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        timeout=1100,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"

    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "idioms"), [("with_langchain.py", 13), ("with_llama_index.py", 6)]
)
def test_idioms(served, script, idioms):
    assert len(ask(script, served.url, "policy")) == idioms


def test_lm_eval_scores_what_its_own_backend_scores(served, policy, world, tmp_path):
    """200 items of four answers each: sums of log p, which answer wins, whole texts, and what is
    generated."""
    asked = [
        each.messages[-1].content for each in records.read(Prompt, world / "prompts-train.jsonl")
    ]
    answers = [" A", " B.", " A mill", "."]  # of one token and of several
    items = [
        [f"[INST] {question} [/INST]", [*answers[index % 3 :], f" {question.split()[-1]}"]]
        for index, question in enumerate((asked * 2)[:200])
    ]
    file = tmp_path / "asked.json"
    file.write_text(
        json.dumps(
            {
                "items": items,
                "texts": [" ".join(pair) for pair in pairwise(asked)][:50],
                "chats": asked[:40],
            }
        )
    )
    found = json.loads(ask("with_lm_eval.py", served.url, "policy", policy, file)[-1])
    assert found["items"] == found["right"] == 200
    assert found["loglikelihood"] < 1e-3
    assert found["rolling"] < 1e-3
    assert (found["greedy"], found["generations"], found["chats"]) == (0, 0, 0)
