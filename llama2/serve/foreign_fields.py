"""Fields that other servers have and this one has not: accepted where their value changes nothing.

Clients send what OpenAI's and vLLM's interfaces have, at values that mean the default. Such a value
is accepted; any other is refused with the reason. A field that is in no table is a misspelling.

Programs made for text-generation-webui, llama.cpp or KoboldCpp send all their settings with every
request, most of them switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import JsonSchemaValue

TOOLS = "tools are not supported by this server"
AUDIO = "audio is not supported by this server"
REASONING = "the model answers without reasoning before it"
REFUSAL = "a refusal is not told apart from an answer by this server; send it as text"
PARTS = {
    "image_url": "images are not supported by this server",
    "image": "images are not supported by this server",
    "input_image": "images are not supported by this server",
    "input_audio": AUDIO,
    "audio_url": AUDIO,
    "file": "files are not supported by this server",
    "input_file": "files are not supported by this server",
    "video_url": "videos are not supported by this server",
    "refusal": REFUSAL,
}
"""kinds of message parts that other servers take, and why this one does not"""


class Inert:
    """A field that has no effect: null or one of `values`. Another value is refused with `why`."""

    def __init__(self, *values: Any, why: str) -> None:
        self.values, self.why = (None, *values), why

    def json_schema(self) -> JsonSchemaValue:
        """Return the accepted values as JSON Schema."""
        return {"enum": list(self.values)}

    def allows(self, value: Any) -> bool:
        """Return whether a value has no effect."""
        return any(_equal(value, other) for other in self.values)


class Ignored(Inert):
    """A field of a type, whose value never has an effect."""

    def __init__(self, kind: type, **schema: Any) -> None:
        super().__init__(why="it is of the wrong type")
        self._kind, self._schema = kind, {**schema, "description": "accepted and ignored"}

    def json_schema(self) -> JsonSchemaValue:
        """Return the type as JSON Schema."""
        return self._schema

    def allows(self, value: Any) -> bool:
        """Return whether a value is of the type."""
        return value is None or isinstance(value, self._kind)


_ANY = Ignored(object)
_TEXT = Ignored(str, type=["string", "null"])
_OBJECT = Ignored(dict, type=["object", "null"])
_FLAG = Ignored(bool, type=["boolean", "null"])
_NO_TOOLS = Inert([], why=TOOLS)
_NO_ANNOTATIONS = Inert([], why="annotations are not supported by this server")
_NO_REASONING = Inert("", why="the format has no place for reasoning")
_BEAMS = "beam search is not supported by this server"
_MIN_LENGTH = "a minimum length is not supported by this server"
_SAMPLER = "this way to sample is not supported by this server"
_FORM = "use response_format"
_RANGE = "repetition_penalty_range"

COMMON: Mapping[str, Inert] = {
    "user": _TEXT,
    "metadata": _OBJECT,
    "store": _FLAG,
    "service_tier": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "prompt_cache_retention": _TEXT,
    "prompt_cache_options": _OBJECT,
    "cache_salt": _TEXT,
    "request_id": _TEXT,
    "priority": Inert(0, why="requests are served in the order in which they come"),
    "min_tokens": Inert(0, why=_MIN_LENGTH),
    "use_beam_search": Inert(False, why=_BEAMS),
    "length_penalty": Inert(1, why=_BEAMS),
    "early_stopping": Inert(False, why=_BEAMS),
    "include_stop_str_in_output": Inert(False, why="a stop string is never part of the answer"),
    "skip_special_tokens": Inert(True, why="control tokens have no text here"),
    "spaces_between_special_tokens": Inert(True, False, why="true or false"),
    "detokenize": Inert(True, why="answers are always sent as text"),
    "truncate_prompt_tokens": Inert(why="prompts are not cut by this server; send a shorter one"),
    "prompt_logprobs": Inert(why="use echo and logprobs of /v1/completions"),
    "bad_words": Inert([], why="use logit_bias"),
    "allowed_token_ids": Inert(why="use logit_bias"),
    "logits_processors": Inert([], why="logits processors are not supported by this server"),
    "structured_outputs": Inert({}, why=_FORM),
    "guided_json": Inert(why=_FORM),
    "guided_regex": Inert(why="use response_format with a schema that has a pattern"),
    "guided_choice": Inert(why="use response_format with a schema that has an enum"),
    "guided_grammar": Inert(why="grammars but JSON's are not supported by this server"),
}
"""fields of OpenAI's and vLLM's completions of both kinds"""
CHAT: Mapping[str, Inert] = {
    **COMMON,
    "parallel_tool_calls": _FLAG,
    "include_reasoning": _FLAG,
    "prediction": _OBJECT,
    "tools": _NO_TOOLS,
    "tool_choice": Inert("none", "auto", why=TOOLS),
    "function_call": Inert("none", "auto", why=TOOLS),
    "functions": _NO_TOOLS,
    "reasoning_effort": Inert("none", why=REASONING),
    "verbosity": Inert("medium", why="ask for a short or a long answer in the conversation"),
    "modalities": Inert([], ["text"], why="answers are text alone"),
    "audio": Inert(why=AUDIO),
    "web_search_options": Inert(why="web search is not supported by this server"),
    "moderation": Inert(why="start the server with --safety.model"),
    "echo": Inert(False, why="only /v1/completions echoes"),
    "return_token_ids": Inert(False, why="only /v1/completions reports ids"),
    "add_special_tokens": Inert(False, why="the format says where BOS and EOS stand"),
    "chat_template": Inert(why="conversations are in the model's own format"),
    "chat_template_kwargs": Inert(
        {},
        {"enable_thinking": False},
        {"thinking": False},
        why="the model's format is asked for without options",
    ),
    "documents": Inert([], why="put documents into the conversation"),
    "mm_processor_kwargs": Inert({}, why="messages are text alone"),
}
"""the same of chats"""
COMPLETION: Mapping[str, Inert] = {
    **COMMON,
    "suffix": Inert("", why="filling in before a suffix is not supported by this server"),
    "add_special_tokens": Inert(True, why="send token ids for a prompt without BOS"),
}
"""the same of completions of a text"""
MESSAGE: Mapping[str, Inert] = {
    "name": _TEXT,
    "refusal": Inert("", why=REFUSAL),
    "tool_calls": _NO_TOOLS,
    "tool_call_id": Inert(why=TOOLS),
    "function_call": Inert(why=TOOLS),
    "audio": Inert(why=AUDIO),
    "annotations": _NO_ANNOTATIONS,
    "reasoning": _NO_REASONING,
    "reasoning_content": _NO_REASONING,
    "parsed": _ANY,
    "cache_control": _ANY,
    "id": _ANY,
    "provider_specific_fields": _ANY,
}
"""the same of messages"""
PART: Mapping[str, Inert] = {
    "annotations": _NO_ANNOTATIONS,
    "cache_control": _ANY,
    "prompt_cache_breakpoint": _ANY,
}
"""the same of a message's parts"""
FOREIGN: Mapping[str, Inert] = {
    **dict.fromkeys(
        (
            "typical",
            "typical_p",
            "typ_p",
            "tfs",
            "tfs_z",
            "encoder_repetition_penalty",
            "guidance_scale",
        ),
        Inert(1, why=_SAMPLER),
    ),
    **dict.fromkeys(
        (
            "top_a",
            "top_n_sigma",
            "nsigma",
            "epsilon_cutoff",
            "eta_cutoff",
            "penalty_alpha",
            "mirostat",
            "mirostat_mode",
            "smoothing_factor",
            "dry_multiplier",
            "xtc_probability",
            "dynatemp_range",
            "no_repeat_ngram_size",
        ),
        Inert(0, why=_SAMPLER),
    ),
    _RANGE: Inert(0, why="repetition_penalty regards the whole text"),
    **dict.fromkeys(("dynamic_temperature", "temperature_last"), Inert(False, why=_SAMPLER)),
    **dict.fromkeys(
        ("samplers", "sampler_priority", "sampler_order"),
        Inert([], "", why="the order of the ways to sample is fixed"),
    ),
    "num_beams": Inert(1, why=_BEAMS),
    "repeat_penalty": Inert(1, why="use repetition_penalty"),
    "do_sample": Inert(True, why="set temperature to 0 for the likeliest tokens"),
    "min_length": Inert(0, why=_MIN_LENGTH),
    "n_probs": Inert(0, why="use logprobs"),
    "add_bos_token": Inert(True, why="send token ids to /v1/completions for a prompt without BOS"),
    "ban_eos_token": Inert(False, why="use ignore_eos, or logit_bias"),
    **dict.fromkeys(
        ("stopping_strings", "custom_stopping_strings", "stop_sequence"),
        Inert([], "", why="use stop"),
    ),
    **dict.fromkeys(
        ("banned_tokens", "banned_strings", "custom_token_bans"),
        Inert([], "", why="use logit_bias"),
    ),
    **dict.fromkeys(("grammar", "grammar_string", "json_schema"), Inert("", {}, why=_FORM)),
    "negative_prompt": Inert("", why=_SAMPLER),
    "preset": Inert("", "None", why="send the settings of the preset"),
    **dict.fromkeys(("enable_thinking", "think"), Inert(False, why=REASONING)),
    "thinking": Inert({}, {"type": "disabled"}, why=REASONING),
    "reasoning": Inert({}, {"enabled": False}, {"effort": "none"}, why=REASONING),
}
"""settings of other servers, with the values that switch them off"""
HINTS = frozenset(
    (
        "mirostat_tau",
        "mirostat_eta",
        "smoothing_curve",
        "dry_base",
        "dry_allowed_length",
        "dry_sequence_breakers",
        # of what is off
        "dry_penalty_last_n",
        "xtc_threshold",
        "dynatemp_low",
        "dynatemp_high",
        "dynatemp_exponent",
        "repeat_last_n",
        "truncation_length",
        "auto_max_new_tokens",
        "max_tokens_second",
        "cache_prompt",
        "slot_id",
        "id_slot",
        "timings_per_token",
        "return_progress",
        "reasoning_format",
        "backend_sampling",
        "static_cache",
        "prompt_lookup_num_tokens",
        "num_ctx",
        "num_keep",
        "num_batch",
        "num_thread",
        "num_gpu",
        "use_mmap",
        "use_mlock",
        "keep_alive",
        "session_id",
        "chat_id",
    )
)
"""fields of other servers that do not change the answer"""


def drop_inert(body: Mapping[str, Any], inert: Mapping[str, Inert]) -> dict[str, Any]:
    """Return an object without the fields of a table; ValueError names one that has an effect."""
    for name, field in inert.items():
        if not field.allows(body.get(name)):
            raise ValueError(f"{name}: {field.why}")

    return {name: value for name, value in body.items() if name not in inert}


def drop_foreign(body: Mapping[str, Any], inert: Mapping[str, Inert]) -> dict[str, Any]:
    """Return a request without the fields that have no effect: those of other servers and those of
    `inert`. ValueError names one that has an effect."""
    table = {**FOREIGN, **dict.fromkeys(HINTS, _ANY), **inert}
    if body.get("repetition_penalty") in (None, 1):
        table[_RANGE] = _ANY  # the range of a penalty that is off
    if body.get("tool_choice") == "none":
        table["tools"] = _ANY

    return drop_inert(body, table)


def _equal(value: Any, other: Any) -> bool:
    """Compare as JSON does, where 1 and 1.0 are one number and true is none."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
