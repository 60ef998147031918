"""Cases of the server's interface: what other people's clients send, and what they make of the
answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from checks import Work
from service import ASK, Service

from llama2.formats import checkpoint
from llama2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from run import Bench

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
IDS = [1, 300, 301, 302, 303]


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _own_answers()
    yield from _fields()
    yield from _scores()
    yield from _edges()
    yield from _libraries()


def with_server(work: Callable[[Service], tuple[bool, str]]) -> Work:
    """A case on the one server of the tiny model, which is also served under a name with a
    slash."""
    return lambda bench: work(bench.served(bench.model, bench.model, names="base org/second"))


def _status(response: Any) -> str:
    return f"{response.status_code} {response.text[:200]}"


def answers(path: str = "chat", **body: Any) -> Work:
    """Status 200, and the answer is that of the same request without what was added."""

    def work(service: Service) -> tuple[bool, str]:
        ask = service.chat if path == "chat" else service.complete
        got, plain = ask(**body), ask()
        if got.status_code != 200:
            return False, _status(got)

        found, expected = (_text(one.json()) for one in (got, plain))
        return ("messages" in body or "prompt" in body or found == expected), f"200 {found!r}"

    return with_server(work)


UNREASONED = ("did you mean", "unknown parameter")


def refused(
    pattern: str, path: str = "chat", never: tuple[str, ...] = UNREASONED, **body: Any
) -> Work:
    """Status 400, and the reason is named."""

    def work(service: Service) -> tuple[bool, str]:
        got = (service.chat if path == "chat" else service.complete)(**body)
        text = got.text.lower()
        named = bool(re.search(pattern, text)) and not any(one in text for one in never)

        return got.status_code == 400 and named, _status(got)

    return with_server(work)


def either(one: Work, other: Work) -> Work:
    """Accepted without effect or refused by reason: both are right."""

    def work(bench: Bench) -> tuple[bool, str]:
        right, got = one(bench)
        return (right, got) if right else other(bench)

    return work


def _text(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


# --- what the server sent is taken back ---
def _own_answers() -> Iterator[tuple[str, str, Work]]:
    def again(form: Callable[[Any], Any]) -> Work:
        def work(service: Service) -> tuple[bool, str]:
            client = service.client()
            first = client.chat.completions.create(
                model="base", messages=ASK, max_tokens=4, temperature=0
            )
            said = first.choices[0].message
            more: Any = [*ASK, form(said), {"role": "user", "content": "why"}]
            second = client.chat.completions.create(
                model="base", messages=more, max_tokens=4, temperature=0
            )
            plain = service.chat(
                messages=[*ASK, {"role": "assistant", "content": said.content}, more[-1]]
            ).json()

            return (
                second.choices[0].message.content == _text(plain)
                and second.usage is not None
                and second.usage.prompt_tokens == plain["usage"]["prompt_tokens"]
            ), f"{second.usage}"

        return with_server(work)

    yield (
        "turn: message object",
        "the client's message object may be sent back",
        again(lambda said: said),
    )
    yield "turn: model_dump", "... as a dictionary", again(lambda said: said.model_dump())
    yield (
        "turn: to_dict",
        "... as the client's other dictionary",
        again(lambda said: said.to_dict()),
    )

    for extra in (
        {"refusal": None},
        {"tool_calls": None},
        {"tool_calls": []},
        {"function_call": None},
        {"audio": None},
        {"annotations": []},
        {"annotations": None},
        {"name": None},
        {"reasoning_content": None},
    ):
        turns = [
            *ASK,
            {"role": "assistant", "content": "b", **extra},
            {"role": "user", "content": "c"},
        ]
        yield f"turn: {extra}", "an assistant's turn may say so", answers(messages=turns)

    raw = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "refusal": None},
            {"role": "user", "content": "c"},
        ]
    }
    yield "turn: raw refusal", "200", answers(**raw)
    calls = [
        *ASK,
        {"role": "assistant", "content": "b", "tool_calls": [{"id": "x", "type": "function"}]},
        *ASK,
    ]
    yield "turn: tool calls", "refused by reason", refused("tool", messages=calls)


# --- fields that change nothing, or are not there ---
def _fields() -> Iterator[tuple[str, str, Work]]:
    nothing: list[dict[str, Any]] = [
        {"tools": None},
        {"tools": []},
        {"tool_choice": None},
        {"tool_choice": "none"},
        {"functions": None},
        {"function_call": None},
        {"parallel_tool_calls": None},
        {"parallel_tool_calls": False},
        {"parallel_tool_calls": True},
        {"store": None},
        {"store": False},
        {"metadata": None},
        {"metadata": {"a": "b"}},
        {"service_tier": None},
        {"service_tier": "auto"},
        {"modalities": None},
        {"modalities": ["text"]},
        {"audio": None},
        {"prediction": None},
        {"reasoning_effort": None},
        {"web_search_options": None},
        {"stream_options": None},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"logit_bias": None},
        {"logit_bias": {}},
        {"top_k": None},
        {"seed": None},
        {"stop": None},
        {"stop": []},
        {"user": None},
        {"user": "u"},
        {"n": None},
        {"n": 1},
        {"logprobs": None},
        {"logprobs": False},
        {"top_logprobs": None},
        {"max_completion_tokens": None},
        {"safety_identifier": "u"},
        {"prompt_cache_key": "u"},
        {"frequency_penalty": 0},
        {"presence_penalty": 0},
    ]
    for extra in nothing:
        yield f"chat: {extra}", "changes nothing", answers(**extra)

    for extra in (
        {"suffix": None},
        {"best_of": None},
        {"best_of": 1},
        {"echo": None},
        {"echo": False},
        {"logprobs": None},
        {"stop": None},
        {"user": "u"},
        {"logit_bias": None},
    ):
        yield f"completion: {extra}", "changes nothing", answers("completions", **extra)

    for role in ("user", "assistant", "system"):
        turns = {
            "user": [{"role": "user", "content": "a", "name": "bob"}],
            "assistant": [*ASK, {"role": "assistant", "content": "b", "name": "agent"}, *ASK],
            "system": [{"role": "system", "content": "s", "name": "me"}, *ASK],
        }[role]
        yield f"turn: name of {role}", "accepted", answers(messages=turns)

    yield (
        "turn: content null",
        "accepted as empty, or refused by reason",
        either(
            answers(messages=[*ASK, {"role": "assistant", "content": None}, *ASK]),
            refused("content", messages=[*ASK, {"role": "assistant", "content": None}, *ASK]),
        ),
    )
    for option in ("include_obfuscation", "continuous_usage_stats"):
        yield f"stream_options.{option}", "a stream with usage at its end", _streams(option)

    yield "chat: tools", "refused by reason", refused("tool", tools=[TOOL], tool_choice="auto")
    yield (
        "chat: tools, required",
        "refused by reason",
        refused("tool", tools=[TOOL], tool_choice="required"),
    )
    yield "chat: functions", "refused by reason", refused("function", functions=[TOOL["function"]])
    yield (
        "chat: audio",
        "refused by reason",
        refused("audio|modalities", modalities=["text", "audio"]),
    )
    yield (
        "chat: store true",
        "of no effect, or refused by reason",
        either(answers(store=True), refused("store", store=True)),
    )
    yield (
        "chat: reasoning_effort",
        "refused by reason, or of no effect",
        either(
            answers(reasoning_effort="low"), refused("reasoning_effort", reasoning_effort="low")
        ),
    )
    yield (
        "chat: verbosity",
        "refused by reason, or of no effect",
        either(answers(verbosity="low"), refused("verbosity", verbosity="low")),
    )
    image = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    yield (
        "chat: image",
        "refused by reason",
        refused("image", messages=[{"role": "user", "content": image}]),
    )
    cached = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    yield (
        "chat: cache_control",
        "accepted, or refused by name",
        either(
            answers(messages=[{"role": "user", "content": cached}]),
            refused("cache_control", never=(), messages=[{"role": "user", "content": cached}]),
        ),
    )
    yield "completion: best_of 2", "refused by reason", refused("best_of", "completions", best_of=2)
    yield "completion: suffix", "refused by reason", refused("suffix", "completions", suffix="x")
    yield (
        "chat: typo",
        "refused, the right name suggested",
        refused("temperature", never=(), temprature=1),
    )
    yield (
        "completion: typo",
        "refused, the right name suggested",
        refused("max_tokens", "completions", (), max_token=1),
    )


def _streams(option: str) -> Work:
    def work(service: Service) -> tuple[bool, str]:
        options: Any = {"include_usage": True, option: option.startswith("cont")}
        parts = list(
            service.client().chat.completions.create(
                model="base",
                messages=ASK,
                max_tokens=4,
                temperature=0,
                stream=True,
                stream_options=options,
            )
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

        return parts[-1].usage is not None and text == _text(
            service.chat().json()
        ), f"{parts[-1].usage} {text!r}"

    return with_server(work)


# --- log-likelihoods ---
def _scores() -> Iterator[tuple[str, str, Work]]:
    def harness(bias: dict[str, float] | None, tokens: int, **more: Any) -> Work:
        """The request of lm-evaluation-harness: as many entries as ids, and one a token drawn; sums
        that are right."""

        def work(bench: Bench) -> tuple[bool, str]:
            service = bench.served(bench.model, bench.model, names="base org/second")
            model = checkpoint.load(bench.model).eval()
            with torch.no_grad():
                expected = model(torch.tensor([IDS])).log_softmax(-1)[0]

            got = service.complete(
                prompt=[IDS],
                max_tokens=tokens,
                logprobs=1,
                echo=True,
                seed=1234,
                **({"logit_bias": bias} if bias else {}),
                **more,
            ).json()
            choice = got["choices"][0]
            found = choice["logprobs"]["token_logprobs"]
            right = all(
                math.isclose(one, float(expected[place, IDS[place + 1]]), abs_tol=1e-3)
                for place, one in enumerate(found[1 : len(IDS)])
            )
            counted = got["usage"]["completion_tokens"] == len(found) - len(IDS)
            lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            equal = {len(choice["logprobs"][key]) for key in lists}

            return (
                len(found) == len(IDS) + tokens
                and right
                and counted
                and equal == {len(found)}
                and found[0] is None
            ), f"{len(found)} entries {found} {got['usage']} {choice['finish_reason']}"

        return work

    yield (
        "lm-eval: EOS drawn",
        "prompt + 1 entries, log p of the prompt right",
        harness({"2": 100}, 1),
    )
    yield "lm-eval: another drawn", "prompt + 1 entries", harness({"300": 100}, 1)
    yield "lm-eval: nothing drawn", "as many entries as ids", harness(None, 0)
    yield (
        "lm-eval: EOS, ids asked for",
        "prompt + 1 entries",
        harness({"2": 100}, 1, return_token_ids=True),
    )

    def drawn(service: Service) -> tuple[bool, str]:
        got = service.complete(max_tokens=3, logprobs=1, logit_bias={"2": 100}).json()
        entries = got["choices"][0]["logprobs"]["token_logprobs"]
        return len(entries) == got["usage"][
            "completion_tokens"
        ] == 1, f"{len(entries)} entries, {got['usage']}"

    def chatted(service: Service) -> tuple[bool, str]:
        got = service.chat(max_tokens=3, logprobs=True, logit_bias={"300": 100}).json()
        entries = got["choices"][0]["logprobs"]["content"]
        return len(entries) == got["usage"][
            "completion_tokens"
        ] == 3, f"{len(entries)} entries, {got['usage']}"

    def streamed(service: Service) -> tuple[bool, str]:
        parts = list(
            service.client().completions.create(
                model="base",
                prompt=IDS,
                max_tokens=1,
                temperature=0,
                logprobs=1,
                echo=True,
                stream=True,
                logit_bias={"2": 100},
                stream_options={"include_usage": True},
            )
        )
        count = sum(
            len(part.choices[0].logprobs.token_logprobs or [])
            for part in parts
            if part.choices and part.choices[0].logprobs
        )
        return count == len(IDS) + 1, f"{count} entries, {parts[-1].usage}"

    yield "logprobs: EOS without echo", "as many entries as completion_tokens", with_server(drawn)
    yield "logprobs: chat", "as many entries as completion_tokens", with_server(chatted)
    yield "logprobs: a stream", "prompt + 1 entries in all", with_server(streamed)


# --- edges ---
def _edges() -> Iterator[tuple[str, str, Work]]:
    def alike(one: dict[str, Any], other: dict[str, Any]) -> Work:
        def work(service: Service) -> tuple[bool, str]:
            first, second = service.chat(**one), service.chat(**other)
            both = first.status_code == second.status_code == 200
            return both and _text(first.json()) == _text(second.json()), _status(first)

        return with_server(work)

    warm = {"temperature": 1, "seed": 3, "max_tokens": 12}
    yield "top_k -1", "all tokens, as 0", alike({**warm, "top_k": -1}, {**warm, "top_k": 0})
    yield "top_k -2", "refused", refused("top_k", top_k=-2)
    yield (
        "top_p 0",
        "the likeliest token always, or refused by name",
        either(alike({**warm, "top_p": 0}, {"max_tokens": 12}), refused("top_p", top_p=0)),
    )

    for extra in ({"max_tokens": -1}, {"stop": ""}, {"stop": list("abcde")}, {"seed": -1}):
        name = next(iter(extra))
        yield (
            f"chat: {extra}",
            "accepted, or refused by name",
            either(answers(**extra, messages=ASK), refused(name, **extra)),
        )

    yield (
        "completion: max_tokens -1",
        "accepted, or refused by name",
        either(
            answers("completions", max_tokens=-1, prompt="a"),
            refused("max_tokens", "completions", max_tokens=-1),
        ),
    )
    for name, turns in {
        "two users": [*ASK, *ASK],
        "assistant first": [{"role": "assistant", "content": "Hi"}, *ASK],
        "two systems": [
            {"role": "system", "content": "a"},
            {"role": "system", "content": "b"},
            *ASK,
        ],
    }.items():
        yield (
            f"turns: {name}",
            "accepted, or refused by reason",
            either(answers(messages=turns), refused("", never=(), messages=turns)),
        )

    yield (
        "prefill",
        "the answer goes on where it was left",
        _prefill({"continue_final_message": True, "add_generation_prompt": False}),
    )
    yield (
        "prefill unasked",
        "the answer goes on, or how to ask for that is said",
        either(
            _prefill({}),
            refused(
                "continue_final_message",
                messages=[*ASK, {"role": "assistant", "content": "tea is"}],
            ),
        ),
    )
    many = [*ASK, {"role": "assistant", "content": "tea"}]
    yield (
        "prefill: contradiction",
        "refused by reason",
        refused(
            "continue_final_message",
            messages=many,
            continue_final_message=True,
            add_generation_prompt=True,
        ),
    )


def _prefill(extra: dict[str, Any]) -> Work:
    def work(bench: Bench) -> tuple[bool, str]:
        service = bench.served(bench.model, bench.model, names="base org/second")
        got = service.chat(messages=[*ASK, {"role": "assistant", "content": "tea is"}], **extra)
        tokenizer = Tokenizer.load(bench.model)
        ids = [tokenizer.bos, *tokenizer.encode("[INST] how is tea [/INST] tea is")]
        plain = service.complete(prompt=ids)

        if got.status_code != 200:
            return False, _status(got)

        found, expected = got.json(), plain.json()
        return (
            found["usage"]["prompt_tokens"] == len(ids)
            and _text(found).strip() == _text(expected).strip()
        ), f"{found['usage']}, {len(ids)} ids; {_text(found)!r} against {_text(expected)!r}"

    return work


# --- libraries ---
def _libraries() -> Iterator[tuple[str, str, Work]]:
    def parsed(service: Service) -> tuple[bool, str]:
        import pydantic

        class Answer(pydantic.BaseModel):
            good: bool
            kind: str = pydantic.Field(min_length=1, max_length=5)

        got = service.client().chat.completions.parse(
            model="base",
            messages=ASK,
            response_format=Answer,
            seed=3,
            max_tokens=200,
            temperature=1,
        )

        return isinstance(got.choices[0].message.parsed, Answer), str(got.choices[0].message.parsed)

    def retrieved(name: str) -> Work:
        return with_server(
            lambda service: ((found := service.client().models.retrieve(name)).id == name, found.id)
        )

    def batch(service: Service) -> tuple[bool, str]:
        got = service.client().completions.create(
            model="base", prompt=[[1, 5, 6], [1, 7]], max_tokens=2
        )
        return len(
            got.choices
        ) == 2 and got.usage is not None and got.usage.prompt_tokens == 5, str(got.usage)

    def twice(service: Service) -> tuple[bool, str]:
        parts = list(
            service.client().chat.completions.create(
                model="base",
                messages=ASK,
                max_tokens=4,
                n=2,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        seen = {part.choices[0].index for part in parts if part.choices}
        return seen == {0, 1} and parts[-1].usage is not None, f"{seen} {parts[-1].usage}"

    yield "openai: parse", "a structured answer", with_server(parsed)
    yield "openai: retrieve base", "the model", retrieved("base")
    yield "openai: retrieve org/second", "a name with a slash is found", retrieved("org/second")
    yield "openai: ids in batches", "two answers, all ids counted", with_server(batch)
    yield "openai: n in a stream", "both answers and the usage", with_server(twice)
