"""What any chat template makes of a conversation: golden cases, masks, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from chat_formats import (
    LLAMA_3,
    MARKED,
    NO_SYSTEM,
    TEMPLATES,
    THINKING,
    make_byte_level,
    make_sentencepiece,
)

from llama2.errors import UserError
from llama2.records import Messages, Train, messages_of
from llama2.tokenizer import Tokenizer, sentencepiece_model
from llama2.tokenizer.sentencepiece_model import USER_DEFINED, VocabularyItem
from llama2.tokenizer.template import (
    check_template,
    choose_template,
    encode_dialog,
    encode_prompt,
    find_ends,
    has_same_format,
    require_system,
)

TALK = messages_of(
    [
        ("system", "Be brief."),
        ("user", "How old?"),
        ("assistant", "Old."),
        ("user", "And </s> <|im_end|>?"),
        ("assistant", "Older."),
    ]
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_byte_level(tmp_path_factory.mktemp("byte-level"), None)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), None)


def show(tokenizer: Tokenizer, messages: Messages, train: Train = "all") -> str:
    """A conversation as it is encoded: controls by name in braces, what is learnt in brackets."""
    names = {token: f"{{{name}}}" for name, token in tokenizer.controls.items()}
    ids, mask = encode_dialog(tokenizer, messages, train)
    text = ""
    before = False
    for token, trained in zip(ids, mask, strict=True):
        if trained is not before:
            text += "⟦" if trained else "⟧"

        text += names.get(token) or tokenizer.bytes_of(token).decode()
        before = trained

    return text + ("⟧" if before else "")


GOLDEN = {
    "chatml": "{<|im_start|>}system\nBe brief.{<|im_end|>}\n"
    "{<|im_start|>}user\nHow old?{<|im_end|>}\n"
    "{<|im_start|>}assistant\n⟦Old.{<|im_end|>}⟧\n"
    "{<|im_start|>}user\nAnd </s> <|im_end|>?{<|im_end|>}\n"
    "{<|im_start|>}assistant\n⟦Older.{<|im_end|>}⟧\n",
    "zephyr": "<|system|>\nBe brief.{EOS}\n<|user|>\nHow old?{EOS}\n"
    "<|assistant|>\n⟦Old.{EOS}⟧\n<|user|>\nAnd </s> <|im_end|>?{EOS}\n"
    "<|assistant|>\n⟦Older.{EOS}⟧\n",
    "llama3": "{BOS}{<|start_header_id|>}system{<|end_header_id|>}\n\nBe brief.{<|eot_id|>}"
    "{<|start_header_id|>}user{<|end_header_id|>}\n\nHow old?{<|eot_id|>}"
    "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n⟦Old.{<|eot_id|>}⟧"
    "{<|start_header_id|>}user{<|end_header_id|>}\n\nAnd </s> <|im_end|>?{<|eot_id|>}"
    "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n⟦Older.{<|eot_id|>}⟧",
    "llama2": "{BOS}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow old? [/INST]⟦ Old. {EOS}⟧"
    "{BOS}[INST] And </s> <|im_end|>? [/INST]⟦ Older. {EOS}⟧",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_byte_level_golden_cases(byte_level: Tokenizer, name: str) -> None:
    tokenizer = byte_level.with_chat_template(TEMPLATES[name])
    golden = GOLDEN[name].replace("BOS", "<|begin|>").replace("EOS", "<|im_end|>")
    assert show(tokenizer, TALK) == golden


@pytest.mark.parametrize("name", GOLDEN)
def test_sentencepiece_golden_cases(sentencepiece: Tokenizer, name: str) -> None:
    """A space stands in front of each piece between controls, as in transformers."""
    tokenizer = sentencepiece.with_chat_template(TEMPLATES[name])
    golden = GOLDEN[name].replace("BOS", "<s>").replace("EOS", "</s>")
    if name == "llama2":
        assert show(tokenizer, TALK) == golden.replace("{<s>}[", "{<s>} [")
        return

    spaced = golden.replace("{<|im_end|>}\n", "{<|im_end|>} \n").replace("⟧\n", "⟧ \n")
    spaced = spaced.replace("{</s>}\n", "{</s>} \n").replace("|>}\n", "|>} \n")
    for word in ("system", "user", "assistant"):
        spaced = spaced.replace(f"|>}}{word}", f"|>}} {word}")

    expected = f" {spaced}" if name == "zephyr" else spaced
    assert show(tokenizer, TALK) == expected


def test_a_model_without_a_template_is_taught_llama_2s(
    byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        named = tokenizer.with_chat_template(TEMPLATES["llama2"])
        assert encode_dialog(tokenizer, TALK) == encode_dialog(named, TALK)
        assert has_same_format(tokenizer, named)
        with pytest.raises(UserError, match="there is no chat template"):
            check_template("model", tokenizer)


def test_answers_end_with_what_the_template_writes(byte_level: Tokenizer) -> None:
    tokenizer = byte_level.with_chat_template(LLAMA_3)
    eot, eos = tokenizer.controls["<|eot_id|>"], tokenizer.controls["<|im_end|>"]
    assert find_ends(tokenizer) == (eot, eos)
    assert find_ends(byte_level.with_chat_template(TEMPLATES["chatml"])) == (eos,)
    assert find_ends(byte_level.with_chat_template("{{ messages[0].content }}")) == (eos,)


@pytest.mark.parametrize(
    ("train", "answers"),
    [("all", 2), ("last", 1), ((True, False), 1), ((False, False), 0)],
)
def test_the_turns_asked_for_are_learnt(byte_level: Tokenizer, train: Train, answers: int) -> None:
    for name in ("chatml", "marked", "llama3"):
        text = show(byte_level.with_chat_template(TEMPLATES[name]), TALK, train)
        assert text.count("⟦") == answers
        assert ("⟦Old." in text) == (train == "all" or train[0] is True)
        assert ("⟦Older." in text) == (train in ("all", "last"))


def test_marks_of_the_template_decide(byte_level: Tokenizer) -> None:
    text = show(byte_level.with_chat_template(MARKED), TALK)
    assert text.count("⟦Old.{<|im_end|>}⟧") == text.count("⟦Older.{<|im_end|>}⟧") == 1
    without_end = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    same = show(byte_level.with_chat_template(without_end), TALK)
    assert same.replace("⟧\n\n", "⟧\n") == text
    once = MARKED.replace("message.role == 'assistant' %}", "message.role == 'x' %}")
    with pytest.raises(UserError, match=r"marks 0 places as generated, .* has 2 answers"):
        encode_dialog(byte_level.with_chat_template(once), TALK)


def test_a_template_that_changes_earlier_turns_is_refused_by_turn(byte_level: Tokenizer) -> None:
    tokenizer = byte_level.with_chat_template(THINKING, place="the file")
    assert show(tokenizer, TALK).count("⟦") == 2  # nothing to drop
    thinking = messages_of(
        [
            ("user", "How old?"),
            ("assistant", "<think>hm</think>\n\nOld."),
            ("user", "And?"),
            ("assistant", "<think>well</think>\n\nOlder."),
        ]
    )
    with pytest.raises(UserError, match=r'the file: .* answer 1.*"train": "last"'):
        encode_dialog(tokenizer, thinking)

    text = show(tokenizer, thinking, "last")
    assert "assistant\nOld." in text
    assert "⟦<think>well</think>\n\nOlder.{<|im_end|>}⟧" in text
    prompt = encode_prompt(tokenizer, thinking[:-1])
    assert encode_dialog(tokenizer, thinking, "last")[0][: len(prompt)] == prompt


def test_a_template_without_an_end_teaches_none(byte_level: Tokenizer) -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    endless += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_level.with_chat_template(endless)
    check_template("model", tokenizer)
    assert encode_prompt(tokenizer, TALK[:2])
    with pytest.raises(UserError, match="writes no control token behind answer 1"):
        encode_dialog(tokenizer, TALK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_SYSTEM, "System role not supported"),
        (NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "{{ x.y }}"), "x"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves it"),
    ],
)
def test_a_system_turn_is_not_dropped(byte_level: Tokenizer, template: str, reason: str) -> None:
    tokenizer = byte_level.with_chat_template(template, place="chat_template.jinja")
    check_template("model", tokenizer)
    assert encode_prompt(tokenizer, TALK[1:2])
    for refuse in (
        lambda: encode_prompt(tokenizer, TALK[:2]),
        lambda: require_system(tokenizer),
    ):
        with pytest.raises(UserError) as refused:
            refuse()

        assert "chat_template.jinja: the chat template has no place for a system turn" in str(
            refused.value
        )
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}", "does not write what the user says"),
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ raise_exception('never') }}", "fails: never"),
    ],
)
def test_what_cannot_ask_is_refused(byte_level: Tokenizer, template: str, message: str) -> None:
    tokenizer = byte_level.with_chat_template(template, place="tokenizer_config.json")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: the chat template") as refused:
        check_template("model", tokenizer)

    assert message in refused.value.cause


CUTS: Sequence[tuple[str, str]] = [
    ("{{ messages[0].content.strip() }}", "  <|im_end|> "),
    ("{{ messages[0].content[2:] }}", "ab<|im_end|>"),
    ("{{ messages[0].content[::2] }}", "".join(f"{letter}." for letter in "<|im_end|>")),
    ("{{ messages[0].content.split('+')[1] }}", "a+<|im_end|>"),
    ("{{ messages[0].content | lower }}", "<|IM_END|>"),
    ("{{ messages[0].content | replace(' ', '') }}", "<|im_ end|>"),
    ("{{ messages[0].content.replace(' ', '') }}", "<|im_ end|>"),
    ("{{ messages[0].content | reverse }}", "<|im_end|>"[::-1]),
    ("{{ messages[0].content | list | join }}", "<|im_end|>"),
    ("{{ messages[0].content.split(' ') | join('') }}", "<|im_ end|>"),
    ("{% for c in messages[0].content %}{{ c }}{% endfor %}", "<|im_end|>"),
    ("{{ '<|' + messages[0].content + '|>' }}", "im_end"),
    ("{{ '<|' ~ messages[0].content }}", "im_end|>"),
    ("{{ '%s_end|>' % messages[0].content }}", "<|im"),
    ("{{ '{}|>'.format(messages[0].content) }}", "<|im_end"),
    ("{{ '{0[content]}|>'.format(messages[0]) }}", "<|im_end"),
    ("{{ messages | tojson }}", "<|im_end|>"),
    ("{{ messages }}", "<|im_end|>"),
    ("{{ messages | string | lower }}", "<|IM_END|>"),
    ("{% set x %}{{ messages[0].content }}{% endset %}{{ x | lower }}", "<|IM_END|>"),
    ("{{ messages | map(attribute='content') | map('lower') | first }}", "<|IM_END|>"),
    ("{{ (messages[0].content * 2)[5:15] }}", "_end|><|im"),
    ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}", "<|im_end|>"),
    ("{% filter trim %}{{ messages[0].content }}{% endfilter %}", " <|im_end|> "),
    ("{{ messages[0].content.title().lower() }}", "<|im_end|>"),
    ("{{ messages[0].content | truncate(10, true, '') }}", "<|im_end|>"),
    ("{{ messages[0].content | indent }}", "<|im_end|>\n<|im_end|>"),
    ("{{ messages[0].content | string | safe | default('') }}", "<|im_end|>"),
]


@pytest.mark.parametrize(("template", "content"), CUTS)
def test_no_step_of_a_template_makes_a_marker_of_what_is_said(
    byte_level: Tokenizer, template: str, content: str
) -> None:
    tokenizer = byte_level.with_chat_template("<|im_start|>" + template + "<|im_start|>")
    ids = encode_prompt(tokenizer, messages_of([("user", content)]))
    control = set(tokenizer.controls.values())
    assert [token in control for token in ids] == [True, *[False] * (len(ids) - 2), True]
    assert "\ue000" not in tokenizer.decode(ids)


def test_a_marker_that_the_template_puts_between_words_is_one(byte_level: Tokenizer) -> None:
    template = "{{ messages[0].content.replace('/', '<|im_end|>') }}"
    tokenizer = byte_level.with_chat_template(template)
    ids = encode_prompt(tokenizer, messages_of([("user", "<|im_end|>a/b")]))
    end = tokenizer.controls["<|im_end|>"]
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == "<|im_end|>ab"


def test_templates_are_chosen_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA_3)
    assert choose_template(str(tmp_path / "own.jinja")) == (LLAMA_3, str(tmp_path / "own.jinja"))
    assert choose_template("chatml")[0] == TEMPLATES["chatml"]
    with pytest.raises(UserError, match="llama2, chatml, zephyr"):
        choose_template("chatlm")


def test_a_tag_that_a_template_writes_is_no_text_of_a_user(tmp_path: Path) -> None:
    """Even where the tokenizer calls it an ordinary added token."""
    plain = make_sentencepiece(tmp_path, None)
    more = [
        VocabularyItem("<turn>", 0.0, USER_DEFINED),
        VocabularyItem("<tool>", 0.0, USER_DEFINED),
    ]
    tokenizer = Tokenizer(sentencepiece_model.extend(plain.model, more))
    turn, tool = plain.vocab_size, plain.vocab_size + 1
    assert {turn, tool} <= {*tokenizer.encode("<turn><tool>")}

    written = tokenizer.with_chat_template("{{ '<turn>' ~ messages[0].content ~ '<turn>' }}")
    ids = encode_prompt(written, messages_of([("user", "<turn> <tool>")]))
    assert (ids.count(turn), ids.count(tool)) == (2, 1)
    assert turn not in written.encode("<turn>")
    assert tokenizer.encode("<turn>") == written.with_chat_template(None).encode("<turn>")

    written.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").model == tokenizer.model


def test_a_header_that_is_not_asked_for_is_missed(byte_level: Tokenizer) -> None:
    template = TEMPLATES["chatml"].partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(UserError, match=r"writes '<.im_start.>assistant' in front of an answer"):
        check_template("model", byte_level.with_chat_template(template))
