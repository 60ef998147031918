"""Constrained answers: whatever the logits, the text is JSON of the shape asked for, and ends
exactly when complete."""

from __future__ import annotations

import json
import re

import pytest
import torch

from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.grammar import JsonGrammar, json_grammar
from llama2.generate.sampling import Sampling
from llama2.records import Message
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import BOS, EOS, UNKNOWN, Tokenizer
from llama2.tokenizer.train import train

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "mood": {"enum": ["glad", "sad", None, 3]},
    },
    "required": ["name", "mood"],
    "additionalProperties": False,
}
SCHEMAS = {
    "object": PERSON,
    "enum": {"enum": ["yes", "no", "für immer ✓", 12]},
    "nested arrays": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}},
    },
    "numbers": {
        "type": "object",
        "properties": {
            "n": {"type": "number", "minimum": -2, "maximum": 7.5},
            "i": {"type": "integer", "minimum": 10, "maximum": 99},
        },
        "required": ["n", "i"],
        "additionalProperties": False,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "unicode": {
        "type": "object",
        "properties": {"größe": {"const": "日本語🙂"}},
        "required": ["größe"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/leaf",
    },
}


def write(tokenizer: Tokenizer, grammar: JsonGrammar, logits, limit: int = 2000) -> list[int]:
    """The likeliest text of `logits(tokens)` under the grammar; EOS is the last id."""
    tokens: list[int] = []
    while not tokens or tokens[-1] != EOS:
        allowed_V = grammar.mask()
        assert not allowed_V[[UNKNOWN, BOS]].any()
        if allowed_V[EOS]:
            json.loads(b"".join(tokenizer.bytes_of(token) for token in tokens))

        tokens.append(int(logits(tokens).masked_fill(~allowed_V, -torch.inf).argmax()))
        grammar.accept(tokens[-1])
        assert len(tokens) < limit

    assert grammar.done
    return tokens


def noise(vocab_size: int, seed: int):
    """Random logits that tire of long answers: EOS and what closes a value grow likelier."""
    generator = torch.Generator().manual_seed(seed)
    return lambda tokens: (
        torch.randn(vocab_size, generator=generator) + closing(vocab_size) * len(tokens) / 40
    )


def closing(vocab_size: int):
    bonus_V = torch.zeros(vocab_size)
    bonus_V[[EOS, *(3 + ord(character) for character in '"]}:,ntf')]] = 1.0
    return bonus_V


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_logits_write_what_validates(tokenizer, name):
    jsonschema = pytest.importorskip("jsonschema_rs")
    grammar = json_grammar(tokenizer, SCHEMAS[name])
    texts = set()

    for seed in range(12):
        tokens = write(tokenizer, grammar.fresh(), noise(tokenizer.vocab_size, seed))
        text = tokenizer.decode(tokens)
        jsonschema.validate(SCHEMAS[name], json.loads(text))
        assert not re.search(r"\s$", text)
        texts.add(text)

    assert len(texts) > (name != "unicode")


def test_pieces_that_run_across_brackets_and_quotes(tmp_path):
    texts = [
        '{"name": "Ann", "mood": "glad"}',
        '{"mood": null, "name": ""}',
        '[["sad"], [], {"name": 3}]',
    ]
    tokenizer = train(texts * 9, 300, tmp_path)
    assert sum(tokenizer.bytes_of(token).startswith(b'"') for token in range(300)) > 2
    grammar = json_grammar(tokenizer, PERSON)

    for seed in range(12):
        found = json.loads(tokenizer.decode(write(tokenizer, grammar.fresh(), noise(300, seed))))
        assert {"name", "mood"} <= set(found) <= {"name", "mood", "age"}


def test_without_a_schema_any_object(tokenizer):
    for seed in range(6):
        text = tokenizer.decode(
            write(tokenizer, json_grammar(tokenizer), noise(tokenizer.vocab_size, seed))
        )
        assert isinstance(json.loads(text), dict)


def test_the_end_comes_when_the_text_is_complete_and_not_before(tokenizer):
    grammar = json_grammar(tokenizer, {"type": "integer", "minimum": 0, "maximum": 99})
    one, two = 3 + ord("1"), 3 + ord("2")
    assert not grammar.mask()[EOS]
    grammar.accept(one)
    assert grammar.mask()[EOS]
    assert grammar.mask()[two]
    assert not grammar.done  # another digit may follow
    grammar.accept(two)
    assert grammar.mask().nonzero().flatten().tolist() == [EOS]
    assert grammar.done
    grammar.accept(EOS)
    assert grammar.mask().nonzero().flatten().tolist() == [EOS]


def test_a_text_may_begin_with_the_space_that_sentencepiece_puts_there(tokenizer):
    ids = tokenizer.encode('{"name": "Ann", "mood": 3}')
    assert tokenizer.bytes_of(ids[0]).startswith(b" ")
    grammar = json_grammar(tokenizer, PERSON)

    for token in [*ids, EOS]:
        assert grammar.mask()[token]
        grammar.accept(token)

    indented = tokenizer.encode('{\n  "name": "Ann",\n  "mood": 3\n}')
    grammar = json_grammar(tokenizer, PERSON)
    for token in [*indented, EOS]:
        grammar.accept(token)


def test_samples_do_not_share_what_they_said(tokenizer):
    first = json_grammar(tokenizer, PERSON)
    begin_V = first.mask()
    first.accept(3 + ord("{"))
    second = first.fresh()
    assert torch.equal(second.mask(), begin_V)
    assert torch.equal(json_grammar(tokenizer, PERSON).mask(), begin_V)
    assert not torch.equal(first.mask(), begin_V)


def test_a_token_that_is_not_allowed_is_refused(tokenizer):
    grammar = json_grammar(tokenizer, PERSON)
    for token in (EOS, UNKNOWN, BOS, 3 + ord("x")):
        with pytest.raises(ValueError, match="cannot come next"):
            grammar.accept(token)

    grammar.accept(3 + ord("{"))  # a refusal leaves the text as it was


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objct"}, "objct"),
        ({"type": "string", "pattern": "(["}, "unclosed"),
        ({"$ref": "#/nope"}, "/nope"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": [float("nan")]}, "JSON"),
        ({"enum": [{1, 2}]}, "set"),
    ],
)
def test_a_bad_schema_is_named(tokenizer, schema, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        json_grammar(tokenizer, schema)

    assert "\n" not in str(error.value)


def test_a_model_completes(tokenizer, policy):
    model = checkpoint.load(policy).eval()
    prompt = encode_prompt(tokenizer, (Message("user", "Who are you?"),))
    schema = {
        **PERSON,
        "properties": {
            **PERSON["properties"],
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
    }
    sampling = Sampling(max_tokens=200, n=8, stop=(EOS,), grammar=json_grammar(tokenizer, schema))

    for one in Engine(model, precision="fp32").generate([prompt], sampling)[0]:
        assert one.finish == "stop"
        found = json.loads(tokenizer.decode(one.tokens))
        assert set(found) - {"age"} == {"name", "mood"}
