"""Runs under an interpreter that has llama-index-llms-openai-like: the idioms of its users against
a server.

Arguments: the address of a server and the name of a model there. Prints the names of the idioms
that hold, one a line.
"""

from __future__ import annotations

import asyncio
import sys

from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.llms.openai_like import OpenAILike

SAME = {
    "api_base": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "model": sys.argv[2],
    "max_tokens": 5,
    "max_retries": 0,
    "temperature": 0,
    "context_window": 256,
    "additional_kwargs": {"logit_bias": {"2": -100}},
}
llm = OpenAILike(**SAME, is_chat_model=True)
plain = OpenAILike(**SAME, is_chat_model=False)
ASK = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="hi")]


def chat() -> None:
    answer = llm.chat(ASK)
    assert answer.message.role == MessageRole.ASSISTANT
    assert answer.message.content
    assert llm.chat(
        [*ASK, answer.message, ChatMessage(role="user", content="more")]
    ).message.content


def stream_chat() -> None:
    parts = list(llm.stream_chat(ASK))
    assert "".join(part.delta or "" for part in parts).strip() == llm.chat(ASK).message.content


def complete() -> None:
    assert llm.complete("hi").text
    assert plain.complete("hi").text
    assert "".join(part.delta for part in plain.stream_complete("hi")) == plain.complete("hi").text


def logprobs() -> None:
    found = OpenAILike(**SAME, is_chat_model=True, logprobs=True, top_logprobs=2).chat(ASK)
    assert len(found.logprobs) == 5
    assert all(len(each) == 2 for each in found.logprobs)
    none = OpenAILike(**SAME, is_chat_model=True, logprobs=False, top_logprobs=0).chat(ASK)
    assert none.message.content == found.message.content


def stop() -> None:
    whole = plain.complete("hi").text
    assert plain.complete("hi", stop=[whole[2:4]]).text == whole[: whole.index(whole[2:4])]


def asynchronously() -> None:
    async def ask():
        whole = await llm.achat(ASK)
        return whole.message.content, [
            part.delta or "" async for part in await llm.astream_chat(ASK)
        ]

    whole, parts = asyncio.run(ask())
    assert whole == "".join(parts).strip()


if __name__ == "__main__":
    for idiom in (chat, stream_chat, complete, logprobs, stop, asynchronously):
        idiom()
        print(idiom.__name__, flush=True)
