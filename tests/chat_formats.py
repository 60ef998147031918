"""Chat templates of several families, and small tokenizers of both engines to try them on.

The templates are written for these tests, in the form of the families that they are called after.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from conversations import trained
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama2.tokenizer import Tokenizer, sentencepiece_model
from llama2.tokenizer.sentencepiece_model import CONTROL, VocabularyItem
from llama2.tokenizer.template import NAMED

LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if system_message %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MARKED = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
THINKING = """{% for message in messages %}
{% set content = message.content %}
{% if message.role == 'assistant' and not loop.last %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
NO_SYSTEM = """{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
SPACED = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ '[SYSTEM]' + message.content + '[/SYSTEM]' }}
{%- elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{% endfor %}"""
TEMPLATES = {**NAMED, "llama3": LLAMA_3, "marked": MARKED, "spaced": SPACED}
CONTROLS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = [
    f"The miller of mill {number} asked his sister:\n\n  How old is the river?\n\nassistant\nuser\n"
    for number in range(300)
]


def make_byte_level(directory: Path, template: str | None, eos: str = "<|im_end|>") -> Tokenizer:
    """Write a byte-level BPE tokenizer as Hugging Face has it, and load it."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|stop|>", *CONTROLS],
        show_progress=False,
    )
    library.train_from_iterator(_TEXTS, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": eos,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(directory)


def make_sentencepiece(directory: Path, template: str | None) -> Tokenizer:
    """Write a SentencePiece tokenizer with added control items, and load it."""
    plain = trained(directory / "plain")
    more = [VocabularyItem(name, 0.0, CONTROL) for name in CONTROLS]
    extended = Tokenizer(sentencepiece_model.extend(plain.model, more))
    extended.with_chat_template(template).save(directory)
    return Tokenizer.load(directory)
