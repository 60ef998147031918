"""The chat format of Llama 2-Chat on SentencePiece: the only place that knows its tags.

Every finished turn is encoded alone, as BOS + "[INST] {user} [/INST] {assistant} " + EOS; the last
user turn as BOS + "[INST] {user} [/INST]". Contents are stripped, and the system text is folded
into the first user turn. The ids are those of Meta's reference code. The tags are plain text, no
vocabulary items: BOS and EOS come from here alone and everything else goes through
`Tokenizer.encode`, which cannot produce them, so a tag or a "</s>" typed by a user stays text. (The
reference refuses prompts with tags in them; we answer them.)

Why prompt and answer may be encoded apart: `Tokenizer` accepts only models whose pieces never run
from a visible character into a space, so no merge spans the space between "[/INST]" and the answer,
and SentencePiece's leading space stands for that space. So ids("... [/INST] a ") = ids("...
[/INST]") + ids("a "): the boundary of the loss is exact, and what the model sees at inference is a
prefix of what it was trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama2.records import Message, Messages, Train, check_roles, mask_turns

if TYPE_CHECKING:
    from llama2.tokenizer.tokenizer import Tokenizer  # it writes CHAT_TEMPLATE beside its model

BEGIN_INSTRUCTION, END_INSTRUCTION = "[INST]", "[/INST]"
BEGIN_SYSTEM, END_SYSTEM = "<<SYS>>\n", "\n<</SYS>>\n\n"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '"
    + BEGIN_SYSTEM.replace("\n", "\\n")
    + "' + messages[0]['content'] + '"
    + END_SYSTEM.replace("\n", "\\n")
    + "' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0)"
    " or message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{{ bos_token + '" + BEGIN_INSTRUCTION + " ' + content.strip() + ' " + END_INSTRUCTION + "' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Jinja for tokenizer_config.json: renders the same text in transformers, vLLM and llama.cpp."""


def is_llama_2(template: str | None) -> bool:
    """Return whether a Jinja template writes this format, and has no tag of another one."""
    tags = (BEGIN_INSTRUCTION, END_INSTRUCTION, BEGIN_SYSTEM.strip(), END_SYSTEM.strip())
    return template is not None and all(tag in template for tag in tags) and "<|" not in template


def encode_dialog(
    tokenizer: Tokenizer, messages: Messages, train: Train = "all"
) -> tuple[list[int], list[bool]]:
    """Return the ids of a finished conversation, and its loss mask of the same length.

    `mask[i]` is True where `ids[i]` is to be predicted: the tokens of the answers and their EOS, of
    the assistant turns that `train` names (`records.Dialog`); never BOS, the user's text or a tag.
    """
    check_roles(messages, last="assistant")
    ids: list[int] = []
    mask: list[bool] = []
    turns = _fold_system(messages)

    for index, trained in zip(range(0, len(turns), 2), mask_turns(messages, train), strict=True):
        prompt = _prompt_ids(tokenizer, turns[index])
        answer = _answer_ids(tokenizer, turns[index + 1])
        ids += prompt + answer
        mask += [False] * len(prompt) + [trained] * len(answer)

    return ids, mask


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation that waits for its answer.

    They end with the closing tag of the last user turn, and are a prefix of `encode_dialog` of any
    conversation that goes on from here. ValueError if roles do not alternate.
    """
    check_roles(messages, last="user")
    turns = _fold_system(messages)
    ids: list[int] = []

    for index, turn in enumerate(turns):
        ids += _prompt_ids(tokenizer, turn) if index % 2 == 0 else _answer_ids(tokenizer, turn)

    return ids


def encode_begun(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation whose last turn is the beginning of an answer.

    They are a prefix of `encode_dialog` of the finished conversation if the beginning ends where a
    word does. Spaces at its end are left out: a space belongs to the item of the word behind it,
    and one alone stands before EOS only. ValueError if roles do not alternate.
    """
    check_roles(messages, last="assistant")
    begun = messages[-1].content.lstrip().rstrip(" ")
    return encode_prompt(tokenizer, messages[:-1]) + (tokenizer.encode(begun) if begun else [])


def render(messages: Messages) -> str:
    """Return a conversation as text, without BOS and EOS, to train a tokenizer on the format."""
    turns = _fold_system(messages)
    return " ".join(_tag(turn) if turn.role == "user" else turn.content.strip() for turn in turns)


def _tag(turn: Message) -> str:
    return f"{BEGIN_INSTRUCTION} {turn.content.strip()} {END_INSTRUCTION}"


def _fold_system(messages: Messages) -> Messages:
    if messages[0].role != "system":
        return messages

    system, first, *rest = messages
    return (Message("user", BEGIN_SYSTEM + system.content + END_SYSTEM + first.content), *rest)


def _prompt_ids(tokenizer: Tokenizer, turn: Message) -> list[int]:
    return [tokenizer.bos, *tokenizer.encode(_tag(turn))]


def _answer_ids(tokenizer: Tokenizer, turn: Message) -> list[int]:
    return [*tokenizer.encode(f"{turn.content.strip()} "), tokenizer.eos]
