"""Turns as other projects spell them."""

import pytest
from strangers import comparisons, dialogs, prompts, turns

from llama2.errors import UserError
from llama2.importers.turns import is_transcript


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("user", "assistant"),
        ("User", "Assistant"),
        ("USER", "ASSISTANT"),
        ("human", "gpt"),
        ("Human", "GPT"),
        (" human ", "bot"),
        ("prompter", "model"),
        ("human", "chatbot"),
        ("user", "AI"),
    ],
)
def test_roles_have_many_names_in_any_case(tmp_path, user, assistant):
    row = {"conversations": [{"from": user, "value": "Hi"}, {"from": assistant, "value": "Hello"}]}
    assert dialogs(tmp_path, row)[0] == [(("Hi", "Hello"), "all")]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_that_are_text_are_joined(tmp_path, kind):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": kind, "text": "H"}, {"type": kind, "text": "i"}]},
            {"role": "assistant", "content": [{"type": kind, "text": "Hello"}]},
        ]
    }
    assert dialogs(tmp_path, row)[0] == [(("Hi", "Hello"), "all")]
    row["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": "x"}}
    read, tally = dialogs(tmp_path, row)
    assert (read, dict(tally.skipped)) == ([], {"a turn is not text": 1})


def test_line_ends_are_one_character(tmp_path):
    row = {"messages": turns("a\r\nb", "c\rd\r\n")}
    for more in ({}, {"train": "all"}):
        assert dialogs(tmp_path, row | more)[0][0][0][0] == "a\nb"

    assert dialogs(tmp_path, row)[0] == [(("a\nb", "c\nd"), "all")]
    assert prompts(tmp_path, {"messages": turns("a\r\nb")})[0] == ["a\nb"]


def test_an_empty_system_turn_is_dropped(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": said}, *turns("a", "b")]}
        for said in ("", " \n", None)
    ]
    assert dialogs(tmp_path, *rows)[0] == [(("a", "b"), "all")] * 3


def test_only_what_the_human_says_opens_a_transcript(tmp_path):
    for text in ("Assistant: You are a bot. Answer.", "Assistant:\n\nHuman: Hi"):
        assert not is_transcript(text)
        assert dialogs(tmp_path, {"prompt": text, "response": "ok"})[0] == [((text, "ok"), "all")]

    assert is_transcript("\n\nHuman: Hi\n\nAssistant:")
    row = {
        "prompt": "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:",
        "response": "Ciao",
    }
    assert dialogs(tmp_path, row)[0] == [(("Hi", "Hello", "Bye", "Ciao"), "all")]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHi<|im_end|>",
        "<s>[INST] Hi [/INST] Hello </s>",
        "[INST] Hi [/INST]",
        "### Human: Hi",
        "<|user|>\nHi",
        "<|begin_of_text|><|start_header_id|>user",
        "<start_of_turn>user\nHi",
    ],
)
def test_a_conversation_in_a_models_template_is_no_prompt(tmp_path, text):
    read, tally = prompts(
        tmp_path, {"text": text}, {"text": f"What does {text} mean?"}, {"text": "Hi"}
    )
    assert read == [f"What does {text} mean?", "Hi"]
    assert dict(tally.skipped) == {"text in a model's template": 1}
    assert "give its turns as a list" in tally.line()


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([{"role": "wizard", "content": "x"}], "turn 1 has the role 'wizard'"),
        ([{"content": "x"}], "turn 1 has the role None"),
        ([{"role": ["user"], "content": "x"}], r"turn 1 has the role \['user'\]"),
        ([{"role": "user"}], "turn 1 has no text"),
        ([{"role": "user", "content": 3}], "turn 1 has no text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            "turn 1 has a part without text",
        ),
        (["x"], "turn 1 must be a mapping of role and content, it is str"),
        ({"role": "user"}, "a list of turns was expected, found dict"),
    ],
)
def test_turns_that_cannot_be_read_are_named(tmp_path, messages, cause):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {cause}"):
        dialogs(tmp_path, {"messages": messages})


def test_a_comparison_of_continuations(tmp_path):
    def goes_on(*said: str) -> list[dict[str, object]]:
        return turns("x", *said)[1:]

    row = {
        "prompt": turns("a"),
        "chosen": goes_on("b", "c", "good"),
        "rejected": goes_on("b", "c", "bad"),
    }
    expected = [(("a", "b", "c"), "good", "bad", "better")]
    assert comparisons(tmp_path, row)[0] == expected
    assert comparisons(tmp_path, row | {"prompt": "a"})[0] == expected
    longer = {
        "prompt": turns("a", "b"),
        "chosen": turns("c", "good"),
        "rejected": turns("c", "bad"),
    }
    assert comparisons(tmp_path, longer)[0] == expected
    whole = {
        "prompt": turns("a"),
        "chosen": turns("a", "b", "c", "good"),
        "rejected": turns("a", "b", "c", "bad"),
    }
    assert comparisons(tmp_path, whole)[0] == expected
    read, tally = comparisons(tmp_path, whole | {"prompt": turns("something else")})
    assert (read, dict(tally.skipped)) == ([], {"prompt and answers differ": 1})

    for rejected in (goes_on("bad"), goes_on("x", "c", "bad"), "bad"):
        read, tally = comparisons(tmp_path, row | {"rejected": rejected})
        assert (read, dict(tally.skipped)) == ([], {"earlier turns differ": 1})


def test_the_system_turn_of_a_prompt_goes_before_whole_conversations(tmp_path):
    prompt = [{"role": "system", "content": "Be kind."}, *turns("a")]
    row = {"prompt": prompt, "chosen": turns("a", "good"), "rejected": turns("a", "bad")}
    assert comparisons(tmp_path, row)[0] == [(("Be kind.", "a"), "good", "bad", "better")]


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", True])
def test_a_label_is_a_number_however_it_is_written(tmp_path, label):
    row = {"prompt": "p", "response 1": "a", "response 2": "b", "label": label}
    assert comparisons(tmp_path, row)[0] == [(("p",), "b", "a", "better")]
