"""Answers made by hand."""

from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.generate.rewards import Score
from llama2.records import Prompt, messages_of


def answer(text="x", finish="stop", prompt=(1, 5), tokens=(6, 7, 2), logprobs=None):
    return Answer(text, Completion(prompt, tokens, logprobs or (-1.0,) * len(tokens), finish))


def score(reward, helpful=0.0, safe=0.0):
    return Score(helpful, safe, reward)


def prompt(text="Hi", safety=False, **metadata):
    return Prompt(messages_of([("user", text)]), text, safety, metadata)
