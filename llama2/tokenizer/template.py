"""Conversations as token ids: the only entrances to chat formats.

Llama 2's format on a SentencePiece tokenizer has Meta's scheme (`llama2_format`); any other format
is what the checkpoint's own template writes (`jinja_format`). A model without a template is taught
Llama 2's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.records import Messages, Train
from llama2.tokenizer import jinja_format, llama2_format
from llama2.tokenizer.llama2_format import CHAT_TEMPLATE, is_llama_2, render

if TYPE_CHECKING:
    from llama2.tokenizer.tokenizer import Tokenizer  # it writes CHAT_TEMPLATE beside its model

__all__ = [
    "CHAT_TEMPLATE",
    "NAMED",
    "TemplateName",
    "check_template",
    "choose_template",
    "describe_template",
    "encode_answered",
    "encode_begun",
    "encode_cut",
    "encode_dialog",
    "encode_prompt",
    "find_ends",
    "has_same_format",
    "is_llama_2",
    "render",
    "require_system",
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TemplateName = Literal["llama2", "chatml", "zephyr"]
NAMED = {"llama2": CHAT_TEMPLATE, "chatml": CHATML, "zephyr": ZEPHYR}
"""templates that can be asked for by name"""

_MARKS = {
    "ChatML": ("<|im_start|>",),
    "Llama 3": ("<|start_header_id|>",),
    "Llama 4": ("<|header_start|>",),
    "Gemma": ("<start_of_turn>",),
    "Command R": ("<|START_OF_TURN_TOKEN|>",),
    "Zephyr": ("<|assistant|>",),
    "Zephyr ": ("'<|' + message['role'] + '|>",),
    "DeepSeek": ("<｜Assistant｜>",),
    "Alpaca": ("### Instruction",),
    "Vicuna": ("ASSISTANT:",),
    "Guanaco": ("### Assistant",),
    "OpenChat": ("GPT4 Correct",),
    "Mistral": ("[INST]", "[/INST]"),
}


def describe_template(template: str | None) -> str:
    """Name a chat template by its tags."""
    if template is None:
        return "none"
    if is_llama_2(template):
        return "Llama 2's"

    for name, marks in _MARKS.items():
        if all(mark in template for mark in marks):
            return f"another's ({name.strip()})"

    return f"another's ({' '.join(template.split())[:60]!r}...)"


def choose_template(choice: str) -> tuple[str, str]:
    """Return a template by its name or from a file of Jinja, and where it stands."""
    if choice in NAMED:
        return NAMED[choice], f"the template {choice}"

    file = Path(choice)
    if not file.is_file():
        raise UserError(
            f"{choice}: no such file, and no chat template has that name",
            f"give a file of Jinja, or one of {', '.join(NAMED)}",
        )

    with explain_os_errors(file):
        return json_files.read_bytes(file).decode("utf-8", "replace"), str(file)


def check_template(place: object, tokenizer: Tokenizer) -> None:
    """UserError unless a model has a chat template that can ask it something."""
    if tokenizer.template is None:
        raise UserError(
            f"{place}: there is no chat template in its tokenizer_config.json",
            "fine-tune it on dialogs (llama2 sft); or, if it was, import it with --chat-template "
            f"FILE or one of {', '.join(NAMED)}",
        )

    if not _is_metas(tokenizer):
        jinja_format.check(tokenizer)


def require_system(tokenizer: Tokenizer) -> None:
    """UserError for a chat template that has no place for a system turn."""
    if not _is_metas(tokenizer):
        jinja_format.check(tokenizer, with_system=True)


def _is_metas(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer takes Meta's scheme for Llama 2's format."""
    named = tokenizer.template is None or is_llama_2(tokenizer.template)
    return named and not tokenizer.is_byte_level


def encode_dialog(
    tokenizer: Tokenizer, messages: Messages, train: Train = "all"
) -> tuple[list[int], list[bool]]:
    """Return the ids of a finished conversation, and its loss mask of the same length.

    `mask[i]` is True where `ids[i]` is to be predicted: the tokens of the answers and what ends
    each, of the assistant turns that `train` names (`records.Dialog`); never BOS, the user's text
    or a tag. ValueError if roles do not alternate. UserError for a conversation that the template
    cannot write, and for one whose answers cannot be told from it.
    """
    if _is_metas(tokenizer):
        return llama2_format.encode_dialog(tokenizer, messages, train)

    return jinja_format.encode_dialog(tokenizer, messages, train)


def encode_answered(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a finished conversation up to the end of its last answer, which is what a
    reward model reads. ValueError and UserError as `encode_dialog`."""
    if _is_metas(tokenizer):
        return llama2_format.encode_dialog(tokenizer, messages)[0]

    return jinja_format.encode_answered(tokenizer, messages)


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation that waits for its answer.

    They are a prefix of `encode_dialog` of any conversation that goes on from here, if the template
    writes the beginning as it did. ValueError if roles do not alternate. UserError for a
    conversation that the template cannot write.
    """
    if _is_metas(tokenizer):
        return llama2_format.encode_prompt(tokenizer, messages)

    return jinja_format.encode_prompt(tokenizer, messages)


def encode_begun(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation whose last turn is the beginning of an answer.

    They are a prefix of `encode_dialog` of the finished conversation if the beginning ends where a
    word does. Spaces at its end are left out: a space belongs to the item of the word behind it.
    ValueError and UserError as `encode_prompt`.
    """
    if _is_metas(tokenizer):
        return llama2_format.encode_begun(tokenizer, messages)

    return jinja_format.encode_begun(tokenizer, messages)


def encode_cut(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation whose last answer was cut off, and so has no end."""
    if _is_metas(tokenizer):
        answer = tokenizer.encode(messages[-1].content)
        return [*llama2_format.encode_prompt(tokenizer, messages[:-1]), *answer]

    return jinja_format.encode_begun(tokenizer, messages)


def has_same_format(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers write conversations alike."""
    if _is_metas(one) and _is_metas(other):
        return True

    return (one.template or CHAT_TEMPLATE) == (other.template or CHAT_TEMPLATE)


def find_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: what the template writes behind one, then EOS of all
    files (`Tokenizer.stops`)."""
    end = None if _is_metas(tokenizer) else jinja_format.find_end(tokenizer)
    return tuple(dict.fromkeys((*(() if end is None else (end,)), *tokenizer.stops)))
