"""Runs under an interpreter that has langchain-openai: the idioms of its users against a server.

Arguments: the address of a server and the name of a model there. Prints the names of the idioms
that hold, one a line.
"""

from __future__ import annotations

import asyncio
import sys
from enum import StrEnum

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, MODEL = f"{sys.argv[1]}/v1", sys.argv[2]
SAME = {"base_url": URL, "api_key": "none", "model": MODEL, "max_retries": 0, "temperature": 0}
LONG = {"logit_bias": {"2": -100}}
chat = ChatOpenAI(**SAME, max_tokens=5, **LONG)
text = OpenAI(**SAME, max_tokens=5, **LONG)


class Mood(StrEnum):
    glad = "glad"
    sad = "sad"


class Animal(BaseModel):
    mood: Mood
    legs: bool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def refused(work, words: str) -> None:
    said = ""
    try:
        work()
    except openai.BadRequestError as error:
        said = str(error)

    assert words in said, said or "it should have been refused"


def invoke() -> None:
    answer = chat.invoke("Hi")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 5
    assert answer.response_metadata["finish_reason"] == "length"


def stream() -> None:
    parts = list(chat.stream("Hi"))
    assert "".join(part.content for part in parts).strip() == chat.invoke("Hi").content
    counted = [
        part.usage_metadata for part in chat.stream("Hi", stream_usage=True) if part.usage_metadata
    ]
    assert counted[-1]["output_tokens"] == 5


def batch() -> None:
    assert [each.content for each in chat.batch(["a", "b", "a"])] == [
        chat.invoke(each).content for each in "aba"
    ]


def asynchronously() -> None:
    async def ask():
        whole = await chat.ainvoke("Hi")
        return whole.content, "".join([part.content async for part in chat.astream("Hi")])

    whole, parts = asyncio.run(ask())
    assert whole == parts.strip()


def chain() -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    assert (prompt | chat | StrOutputParser()).invoke({"question": "Hi"})


def history() -> None:
    own = chat.invoke("Hi")
    turns = [SystemMessage("Be brief."), HumanMessage("Hi", name="bob"), own, HumanMessage("More")]
    assert chat.invoke(turns).content
    turns[2] = AIMessage(own.content, name="agent")
    assert chat.invoke(turns).content
    assert chat.invoke([*turns, chat.invoke(turns), HumanMessage("Still more")]).content


def stop() -> None:
    whole = chat.invoke("Hi").content
    piece = whole[1:3].strip()
    assert chat.bind(stop=[piece]).invoke("Hi").content == whole[: whole.index(piece)].strip()
    assert chat.invoke("Hi", stop=["never said"]).content == whole


def logprobs() -> None:
    found = (
        chat.bind(logprobs=True, top_logprobs=2)
        .invoke("Hi")
        .response_metadata["logprobs"]["content"]
    )
    assert len(found) == 5
    assert all(len(each["top_logprobs"]) == 2 for each in found)


def samples() -> None:
    several = ChatOpenAI(**{**SAME, "temperature": 1.0}, max_tokens=5, seed=1, n=2, **LONG)
    assert len(several.generate([[HumanMessage("a")]]).generations[0]) == 2


def structured() -> None:
    patient = ChatOpenAI(**{**SAME, "temperature": 1.0}, max_tokens=200, seed=1)
    assert isinstance(
        patient.with_structured_output(Animal, method="json_schema").invoke("Hi"), Animal
    )
    raw = patient.with_structured_output(Animal, method="json_schema", include_raw=True).invoke(
        "Hi"
    )
    assert raw["parsing_error"] is None
    assert chat.invoke(
        [HumanMessage("Hi"), AIMessage(raw["raw"].content), HumanMessage("More")]
    ).content


def refusals() -> None:
    refused(lambda: chat.bind_tools([add]).invoke("Hi"), "tools are not supported by this server")
    refused(
        lambda: chat.with_structured_output(Animal, method="function_calling").invoke("Hi"),
        "tools are not supported",
    )
    refused(
        lambda: chat.invoke(
            [HumanMessage(content=[{"type": "image_url", "image_url": {"url": "data:,"}}])]
        ),
        "images are not supported by this server",
    )
    refused(
        lambda: chat.invoke(
            [
                HumanMessage("Hi"),
                AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "x"}]),
                ToolMessage("1", tool_call_id="x"),
            ]
        ),
        "tools are not supported",
    )


def parts() -> None:
    assert chat.invoke(
        [
            HumanMessage(
                content=[
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ]
            )
        ]
    ).content


def texts() -> None:
    assert text.invoke("Hi")
    assert "".join(text.stream("Hi")) == text.invoke("Hi")
    made = text.generate(["a", "b", "c"])
    assert len(made.generations) == 3
    assert made.llm_output["token_usage"]["completion_tokens"] == 15
    assert (
        len(
            OpenAI(**{**SAME, "temperature": 1.0}, max_tokens=4, n=2, best_of=2)
            .generate(["a"])
            .generations[0]
        )
        == 2
    )
    refused(lambda: OpenAI(**SAME, best_of=2, n=1).invoke("Hi"), "best_of")
    found = OpenAI(**SAME, max_tokens=4, logprobs=2, **LONG).generate(["a"]).generations[0][0]
    assert len(found.generation_info["logprobs"]["tokens"]) == 4


if __name__ == "__main__":
    for idiom in (
        invoke,
        stream,
        batch,
        asynchronously,
        chain,
        history,
        stop,
        logprobs,
        samples,
        structured,
        refusals,
        parts,
        texts,
    ):
        idiom()
        print(idiom.__name__, flush=True)
