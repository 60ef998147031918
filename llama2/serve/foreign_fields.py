"""Fields of others' interfaces that say nothing to this server: accepted where their value changes
nothing.

Clients send what OpenAI's and vLLM's interfaces have, at values that mean "as ever". Such a value
is accepted; any other is refused by the reason why it cannot be honoured. What is not declared at
all is a misspelling.

Programs made for text-generation-webui, llama.cpp or KoboldCpp send all their settings with every
request, most of them switched off: `without_foreign` takes those out before a request is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

TOOLS = "tools are not supported by this server"
AUDIO = "audio is not supported by this server"
BEAMS = "beam search is not supported by this server"
LEAST = "a least length is not supported by this server"
REASONING = "the model answers without reasoning before it"
ELSEWHERE = {
    "image_url": "images are not supported by this server",
    "image": "images are not supported by this server",
    "input_image": "images are not supported by this server",
    "input_audio": AUDIO,
    "audio_url": AUDIO,
    "file": "files are not supported by this server",
    "input_file": "files are not supported by this server",
    "video_url": "videos are not supported by this server",
    "refusal": "a refusal is not told apart from an answer by this server; send it as text",
}
"""kinds of parts of a message that others take"""


class Only:
    """A field that may be null or one of `values`, which change nothing; else it is refused for the
    reason `why`."""

    def __init__(self, *values: Any, why: str) -> None:
        self.values, self.why = (None, *values), why

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": list(self.values)}

    def allows(self, value: Any) -> bool:
        """Whether a value changes nothing."""
        return any(_same(value, each) for each in self.values)

    def _check(self, value: Any) -> Any:
        if not self.allows(value):
            raise ValueError(self.why)

        return value


_SAMPLER = "this way to sample is not supported by this server"
_FORM = "use response_format"
_RANGE = "repetition_penalty_range"
FOREIGN: Mapping[str, Only] = {
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
        Only(1, why=_SAMPLER),
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
        Only(0, why=_SAMPLER),
    ),
    _RANGE: Only(0, why="repetition_penalty regards the whole text"),
    **dict.fromkeys(("dynamic_temperature", "temperature_last"), Only(False, why=_SAMPLER)),
    **dict.fromkeys(
        ("samplers", "sampler_priority", "sampler_order"),
        Only([], "", why="the order of the ways to sample is fixed"),
    ),
    "num_beams": Only(1, why=BEAMS),
    "repeat_penalty": Only(1, why="use repetition_penalty"),
    "do_sample": Only(True, why="set temperature to 0 for the likeliest tokens"),
    "min_length": Only(0, why=LEAST),
    "n_probs": Only(0, why="use logprobs"),
    "add_bos_token": Only(True, why="send token ids to /v1/completions for a prompt without BOS"),
    "ban_eos_token": Only(False, why="use ignore_eos, or logit_bias"),
    **dict.fromkeys(
        ("stopping_strings", "custom_stopping_strings", "stop_sequence"),
        Only([], "", why="use stop"),
    ),
    **dict.fromkeys(
        ("banned_tokens", "banned_strings", "custom_token_bans"), Only([], "", why="use logit_bias")
    ),
    **dict.fromkeys(("grammar", "grammar_string", "json_schema"), Only("", {}, why=_FORM)),
    "negative_prompt": Only("", why=_SAMPLER),
    "preset": Only("", "None", why="send the settings of the preset"),
    **dict.fromkeys(("enable_thinking", "think"), Only(False, why=REASONING)),
    "thinking": Only({}, {"type": "disabled"}, why=REASONING),
    "reasoning": Only({}, {"enabled": False}, {"effort": "none"}, why=REASONING),
}
"""fields of other servers, with the values that mean nothing"""
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
"""fields of other servers that are no part of what is asked for"""


def without_foreign(body: Any) -> Any:
    """A request without the fields of other servers that say nothing; ValueError for one that says
    something."""
    if not isinstance(body, dict):
        return body

    for name, field in FOREIGN.items():
        idle = name == _RANGE and body.get("repetition_penalty") in (None, 1)  # there is no penalty
        if not (idle or field.allows(body.get(name))):
            raise ValueError(f"{name}: {field.why}")

    return {
        name: value for name, value in body.items() if name not in FOREIGN and name not in HINTS
    }


def _same(value: Any, other: Any) -> bool:
    """Equal as in JSON, where 1 and 1.0 are one number and true is none."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
