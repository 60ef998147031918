"""Configuration: what a recipe and its flags say, what stays at its default, and how each mistake is named."""

from pathlib import Path

import pytest
from pydantic import Field

from llama2.config import Config, StageConfig, build, merge, overrides, parse, paths, read_yaml
from llama2.errors import UserError
from llama2.stages import launch, ppo, pretrain


class Inner(Config):
    rate: float = Field(0.1, gt=0)
    name: str = "a"
    on: bool = True


class Set(Config):
    path: Path
    weight: float = Field(1.0, gt=0)


class Whole(StageConfig):
    """A configuration of every kind of key."""

    title: str = ""
    inner: Inner = Inner(rate=0.5, name="b")
    sets: dict[str, Set] = {}
    numbers: tuple[float, ...] = (1.0, 2.0)
    limit: int | None = None
    some: Set | None = None


def recipe(tmp_path: Path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def from_flags(*flags: str) -> Whole:
    return parse(Whole, ["--out", "x", *flags], "llama2 test")


# --- what is not said stays at the default --------------------------------------------------------------------------


def test_a_section_given_in_part_keeps_the_rest_of_its_own_default():
    assert from_flags("--inner.rate", "1e-4").inner == Inner(rate=1e-4, name="b")
    assert from_flags("--inner.no-on").inner == Inner(rate=0.5, name="b", on=False)


def test_the_papers_defaults_of_a_stage_survive_a_change_beside_them():
    config = build(ppo.Config, {"out": "x", "policy": "p", "prompts": "q", "rewards": {"helpful": "h"},
                                "training": {"optimizer": {"learning_rate": 1e-4}, "plan": {"clip": 2.0}}})
    default = ppo.Config.model_fields["training"].default
    assert config.training.plan == default.plan.model_copy(update={"clip": 2.0})
    assert config.training.plan.schedule == "constant"
    short = build(pretrain.Config, {"out": "x", "shards": "s", "training": {"plan": {"max_steps": 9}}})
    assert (short.training.plan.warmup_steps, short.training.optimizer.learning_rate) == (2000, 3e-4)


# --- merging --------------------------------------------------------------------------------------------------------


def test_flags_lie_upon_the_recipe_key_by_key(tmp_path):
    file = recipe(tmp_path, "out: runs/x\ninner: {rate: 2, name: c}\nsets: {a: {path: p}, b: {path: q}}\n")
    config = parse(Whole, [file, "--inner.rate=3", "--sets.b.weight", "0.5", "--sets.c.path", "r"], "llama2 test")
    assert config.inner == Inner(rate=3, name="c")
    assert config.sets == {"a": Set(path=Path("p")), "b": Set(path=Path("q"), weight=0.5), "c": Set(path=Path("r"))}
    assert config.out == Path("runs/x")


def test_list_items_are_replaced_by_index(tmp_path):
    file = recipe(tmp_path, "out: x\nnumbers: [3, 4, 5]\n")
    assert parse(Whole, [file, "--numbers.1", "9"], "llama2 test").numbers == (3, 9, 5)
    assert merge([{"a": 1, "b": 2}, {"a": 3}], {"0": {"b": 5}}) == [{"a": 1, "b": 5}, {"a": 3}]
    with pytest.raises(UserError, match=r"'numbers.3': there are 3 of them"):
        parse(Whole, [file, "--numbers.3", "9"], "llama2 test")


def test_yaml_merge_keys_may_be_overridden(tmp_path):
    file = recipe(tmp_path, "out: x\nsets:\n  a: &a {path: p, weight: 2}\n  b: {<<: *a, weight: 3}\n")
    assert parse(Whole, [file], "llama2 test").sets["b"] == Set(path=Path("p"), weight=3)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E+3", 1e3), (".5", 0.5), ("4.0e-3", 4e-3),
                                             ("-2e2", -200.0)])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text, value):
    assert read_yaml(Path(recipe(tmp_path, f"a: {text}\nb: [{text}]"))) == {"a": value, "b": [value]}
    if value > 0:
        assert from_flags("--inner.rate", text).inner.rate == value


@pytest.mark.parametrize("text", ["Run: the first", "yes", "2024", "1.10", "12:30", "- x", "# 1", "", "{a}", "null x"])
def test_text_on_the_command_line_stays_text(text):
    config = from_flags("--title", text, "--sets.a.path", "1.10")
    assert config.title == text
    assert config.sets["a"].path == Path("1.10")


def test_several_values_make_a_list_and_one_does_too():
    assert from_flags("--numbers", "3", "4").numbers == (3, 4)
    assert from_flags("--numbers", "3").numbers == (3,)
    assert from_flags("--numbers", "[3, 4]").numbers == (3, 4)
    assert from_flags("--limit", "null").limit is None
    assert from_flags("--some", "{path: a, weight: 2}").some == Set(path=Path("a"), weight=2)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    (["--inner.rat", "1"], r"unknown key 'inner.rat'; did you mean 'rate'\?"),
    (["--inner.rate", "0"], r"'inner.rate': Input should be greater than 0 \(it is 0\); mend the value"),
    (["--sets.a.wieght", "1"], r"unknown key 'sets.a.wieght'; did you mean 'weight'\?"),
    (["--sets.a.weight", "1"], r"'sets.a.path' is required; give --sets.a.path"),
    (["--some.paht", "x"], r"unknown key 'some.paht'; did you mean 'path'\?"),
    (["--limit", "many"], r"'limit': Input should be a valid integer"),
    (["--titel=x"], r"unknown key 'titel'; did you mean 'title'\?"),
    (["loose"], r"'out': .*'loose'"),
    (["--inner", "1", "--inner.rate", "2"], r"--inner.rate and --inner are both given"),
    (["--seed", "-1.5"], r"'seed': Input should be a valid integer, .* \(it is -1.5\)"),
    (["--quiet"], r"unknown key 'quiet'; known: inner, limit, numbers, out, seed, sets, some, title"),
])
def test_a_wrong_flag_is_named_with_a_cure(flags, message):
    with pytest.raises(UserError, match=message):
        from_flags(*flags)


@pytest.mark.parametrize(("text", "message"), [
    ("out: x\ninner: {rat: 1}", r"recipe.yaml: unknown key 'inner.rat'; did you mean 'rate'\?"),
    ("out: x\ninner:\n  rate: 1\n  rate: 2\n", r"recipe.yaml:4: not valid YAML \(the key 'rate' is given twice\)"),
    ("out: [x\n", r"recipe.yaml:2: not valid YAML"),
    ("- a\n- b\n", "a recipe is a mapping"),
    ("? [a, b]\n: c\n", "not valid YAML"),
    ("inner: {rate: 1}", "'out' is required"),
    ("", "'out' is required"),
])
def test_a_wrong_recipe_is_named_with_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(Whole, [recipe(tmp_path, text)], "llama2 test")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("title: café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8 .* byte 10"):
        parse(Whole, [str(tmp_path / "latin.yaml")], "llama2 test")
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        parse(Whole, [str(tmp_path / "none.yaml")], "llama2 test")


def test_a_dash_alone_is_no_flag():
    with pytest.raises(UserError, match="unexpected argument '--'"):
        overrides(["--"])


# --- help and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", launch.VERBS)
def test_help_shows_every_key_of_a_verb(verb, capsys):
    with pytest.raises(SystemExit) as left:
        launch.command(verb, ["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    fields = {field.alias or name for name, field in launch.stage(verb).Config.model_fields.items()} - {"steps"}
    assert [name for name in sorted(fields) if f"--{name.replace('_', '-').rstrip('-')}" not in shown] == []


def test_every_path_but_out_is_an_input():
    config = build(Whole, {"out": "o", "sets": {"a": {"path": "p"}}, "some": {"path": "q"}})
    assert dict(paths(config)) == {"sets.a.path": Path("p"), "some.path": Path("q")}
