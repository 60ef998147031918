"""What a command needs and does not find, and what is given for a model and is none."""

import json
import os

import pytest
from commands import llama2


def test_all_missing_inputs_of_a_command_are_named_at_once(tmp_path, one_line, base):
    heard = one_line("sft", "--model", base, "--dialogs.a.path", "none/a.jsonl", "--dialogs.b-c.path", "none/b.jsonl",
                     "--out", tmp_path / "deep/out")
    assert heard == ("2 inputs are missing: none/a.jsonl (dialogs.a.path), none/b.jsonl (dialogs.b-c.path); check the "
                     "paths, or run the stages that make them")
    assert not (tmp_path / "deep").exists()


def test_a_recipes_directory_is_no_model(tmp_path, one_line, base, prompts):
    recipe = tmp_path / "demo"
    for name in ("world", "sft", "safe", "v1"):
        (recipe / name).mkdir(parents=True)
    (recipe / "steps.json").write_text(json.dumps(["world", "sft", "safe", "v1", "v2"]))
    for name in ("sft", "v1"):
        (recipe / name / "config.json").write_text("{}")
    (recipe / "safe/config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    told = (f"{recipe}: this is the directory of a recipe, not of a model; give one of its models, such as "
            f"{recipe}/v1; it has sft, v1")
    assert one_line("chat", recipe) == told
    assert one_line("serve", recipe) == told
    assert one_line("collect", "--policies", base, recipe, "--prompts", prompts, "--out", tmp_path / "o") == told
    assert one_line("evaluate", "--versions.SFT", recipe, "--prompts", prompts, "--out", tmp_path / "o") == told
    heard = one_line("ppo", "--policy", base, "--rewards.safe", recipe, "--rewards.helpful", base, "--prompts", prompts,
                     "--out", tmp_path / "o")
    assert heard.endswith(f"such as {recipe}/safe; it has safe")


@pytest.mark.parametrize("verb", ["chat", "sft", "import"])
def test_a_name_of_the_hub_is_explained(tmp_path, one_line, verb):
    name = "meta-llama/Llama-2-7b-chat-hf"
    words = {"chat": ("chat", name), "import": ("import", name, "--out", tmp_path / "i"),
             "sft": ("sft", "--model", name, "--dialogs.a.path", __file__, "--out", tmp_path / "o")}
    assert one_line(*words[verb]) == (
        f"{name}: no such file or directory; nothing is downloaded here: to have it from the Hugging Face Hub, run "
        f"`hf download {name} --local-dir Llama-2-7b-chat-hf` and give Llama-2-7b-chat-hf")


def test_a_pipe_is_no_input(tmp_path, one_line, base):
    os.mkfifo(tmp_path / "pipe")
    assert one_line("sft", "--model", base, "--dialogs.a.path", tmp_path / "pipe", "--out", tmp_path / "o") == (
        f"{tmp_path}/pipe: a pipe or a device, of which nobody can tell later what was read; write it to a file first")


def test_a_run_does_not_lie_in_its_own_input(tmp_path, one_line):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a text that is long enough to stay")
    (tmp_path / "link").symlink_to("texts")
    for out in (tmp_path / "texts/clean", tmp_path / "texts", tmp_path / "link/deep/clean"):
        heard = one_line("clean", "--sources.a.path", tmp_path / "texts", "--out", out)
        assert heard == (f"{out}: lies in {tmp_path}/texts, which is an input (sources.a.path) and would change; "
                         "choose another --out")
    assert [file.name for file in (tmp_path / "texts").iterdir()] == ["a.txt"]
    assert llama2("clean", "--sources.a.path", tmp_path / "texts", "--out", tmp_path / "texts2") == 0
