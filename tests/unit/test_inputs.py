"""What a command needs and does not find, and what is given for a model and is none."""

import json
import os
import shutil

import pytest
from commands import llama2

from llama2 import runs
from llama2.chat import terminal as chat
from llama2.config import StageConfig, build
from llama2.errors import UserError
from llama2.recipe import inputs


def test_all_missing_inputs_of_a_command_are_named_at_once(tmp_path, one_line, base):
    heard = one_line(
        "sft",
        "--model",
        base,
        "--dialogs.a.path",
        "none/a.jsonl",
        "--dialogs.b-c.path",
        "none/b.jsonl",
        "--out",
        tmp_path / "deep/out",
    )
    assert heard == (
        "2 inputs are missing: none/a.jsonl (dialogs.a.path), none/b.jsonl (dialogs.b-c.path); check the "
        "paths, or run the stages that make them"
    )
    assert not (tmp_path / "deep").exists()


def test_a_recipes_directory_is_no_model(tmp_path, one_line, base, prompts):
    recipe = tmp_path / "demo"
    for name in ("world", "sft", "safe", "v1"):
        (recipe / name).mkdir(parents=True)

    (recipe / "steps.json").write_text(json.dumps(["world", "sft", "safe", "v1", "v2"]))
    for name in ("sft", "v1"):
        (recipe / name / "config.json").write_text("{}")

    (recipe / "safe/config.json").write_text(
        '{"architectures": ["LlamaForSequenceClassification"]}'
    )
    told = (
        f"{recipe}: this is the directory of a recipe, not of a model; give one of its models, such as "
        f"{recipe}/v1; it has sft, v1"
    )
    assert one_line("chat", recipe) == told
    assert one_line("serve", recipe) == told
    assert (
        one_line(
            "collect", "--policies", base, recipe, "--prompts", prompts, "--out", tmp_path / "o"
        )
        == told
    )
    assert (
        one_line(
            "evaluate", "--versions.SFT", recipe, "--prompts", prompts, "--out", tmp_path / "o"
        )
        == told
    )
    heard = one_line(
        "ppo",
        "--policy",
        base,
        "--rewards.safe",
        recipe,
        "--rewards.helpful",
        base,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "o",
    )
    assert heard.endswith(f"such as {recipe}/safe; it has safe")


@pytest.mark.parametrize("verb", ["chat", "sft", "import"])
def test_a_name_of_the_hub_is_explained(tmp_path, one_line, verb):
    name = "meta-llama/Llama-2-7b-chat-hf"
    words = {
        "chat": ("chat", name),
        "import": ("import", name, "--out", tmp_path / "i"),
        "sft": ("sft", "--model", name, "--dialogs.a.path", __file__, "--out", tmp_path / "o"),
    }
    assert one_line(*words[verb]) == (
        f"{name}: no such file or directory; nothing is downloaded here: to have it from the Hugging Face Hub, run "
        f"`hf download {name} --local-dir Llama-2-7b-chat-hf` and give Llama-2-7b-chat-hf"
    )


def test_a_pipe_is_no_input(tmp_path, one_line, base):
    os.mkfifo(tmp_path / "pipe")
    assert one_line(
        "sft", "--model", base, "--dialogs.a.path", tmp_path / "pipe", "--out", tmp_path / "o"
    ) == (
        f"{tmp_path}/pipe: a pipe or a device, of which nobody can tell later what was read; write it to a file first"
    )


def test_a_run_does_not_lie_in_its_own_input(tmp_path, one_line):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a text that is long enough to stay")
    (tmp_path / "link").symlink_to("texts")

    for out in (tmp_path / "texts/clean", tmp_path / "texts", tmp_path / "link/deep/clean"):
        heard = one_line("clean", "--sources.a.path", tmp_path / "texts", "--out", out)
        assert heard == (
            f"{out}: lies in {tmp_path}/texts, which is an input (sources.a.path) and would change; "
            "choose another --out"
        )

    assert [file.name for file in (tmp_path / "texts").iterdir()] == ["a.txt"]
    assert (
        llama2("clean", "--sources.a.path", tmp_path / "texts", "--out", tmp_path / "texts2") == 0
    )


# --- a model that is a finished run ---


@pytest.fixture
def tuned(tmp_path, base):
    """A run that left the model."""
    with runs.open_run("work", StageConfig(out=tmp_path / "tuned")) as run:
        for file in base.iterdir():
            (run.path / file.name).write_bytes(file.read_bytes())

    return tmp_path / "tuned"


def changed(model):
    """The model with a template of the user's own."""
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"note": "mine"}, indent=1))
    return file


def test_what_a_user_changes_for_other_programs_is_said(tmp_path, tuned, capsys):
    file = changed(tuned)
    (tuned / "chat_template.jinja").write_text("{{ bos_token }}")
    inputs.check_whole(build(chat.Config, {"checkpoint": tuned}))
    (heard,) = capsys.readouterr().err.splitlines()
    assert heard.startswith(f"{file}: it has ")
    assert heard.endswith("; the model is used as it is")


def test_what_makes_a_model_is_not_changed(tuned):
    (tuned / "config.json").write_text((tuned / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"config.json: it has .* bytes, and this run wrote"):
        inputs.check_whole(build(chat.Config, {"checkpoint": tuned}))


def test_a_release_vouches_for_what_its_run_wrote(tmp_path, tuned, one_line):
    file = changed(tuned)
    assert one_line("release", "--run", tuned, "--out", tmp_path / "r").startswith(
        f"{file}: it has "
    )


def test_the_cure_for_a_model_of_ones_own_works(tmp_path, tuned):
    file = changed(tuned)
    with pytest.raises(UserError) as error:
        runs.fingerprint(tuned)

    assert error.value.cause.startswith(f"{file}: ")
    assert error.value.cure.endswith(
        f"copy {tuned}, delete COMPLETE and manifest.json in the copy, and name the copy"
    )
    shutil.copytree(tuned, tmp_path / "mine")

    for name in ("COMPLETE", "manifest.json"):
        (tmp_path / "mine" / name).unlink()

    assert runs.fingerprint(tmp_path / "mine")
