"""Configuration: what a recipe and its flags say, what stays at its default, and how each mistake
is named."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from llama2.config import Config, StageConfig, build, derive_seed, list_paths, parse, schema, yaml12
from llama2.config.layers import merge
from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError
from llama2.recipe import launch
from llama2.recipe.verbs import VERBS
from llama2.stages import ppo, pretrain


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
    mixed: dict[str, str | int | float] = {}
    files: tuple[Path, ...] = ()
    colour: Literal["red", "green"] = "red"


def recipe(tmp_path: Path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def from_flags(*flags: str) -> Whole:
    return parse(Whole, ["--out", "x", *flags], "llama2 test")


# --- what is not said stays at the default ---


def test_a_section_given_in_part_keeps_the_rest_of_its_own_default():
    assert from_flags("--inner.rate", "1e-4").inner == Inner(rate=1e-4, name="b")
    assert from_flags("--inner.no-on").inner == Inner(rate=0.5, name="b", on=False)


def test_the_papers_defaults_of_a_stage_survive_a_change_beside_them():
    config = build(
        ppo.Config,
        {
            "out": "x",
            "policy": "p",
            "prompts": "q",
            "rewards": {"helpful": "h"},
            "training": {"optimizer": {"learning_rate": 1e-4}, "plan": {"clip": 2.0}},
        },
    )
    default = ppo.Config.model_fields["training"].default
    assert config.training.plan == default.plan.model_copy(update={"clip": 2.0})
    assert config.training.plan.schedule == "constant"
    short = build(
        pretrain.Config, {"out": "x", "shards": "s", "training": {"plan": {"max_steps": 9}}}
    )
    assert (short.training.plan.warmup_steps, short.training.optimizer.learning_rate) == (
        2000,
        3e-4,
    )


# --- merging ---


def test_flags_lie_upon_the_recipe_key_by_key(tmp_path):
    file = recipe(
        tmp_path, "out: runs/x\ninner: {rate: 2, name: c}\nsets: {a: {path: p}, b: {path: q}}\n"
    )
    config = parse(
        Whole,
        [file, "--inner.rate=3", "--sets.b.weight", "0.5", "--sets.c.path", "r"],
        "llama2 test",
    )
    assert config.inner == Inner(rate=3, name="c")
    assert config.sets == {
        "a": Set(path=Path("p")),
        "b": Set(path=Path("q"), weight=0.5),
        "c": Set(path=Path("r")),
    }
    assert config.out == Path("runs/x")


def test_list_items_are_replaced_by_index(tmp_path):
    file = recipe(tmp_path, "out: x\nnumbers: [3, 4, 5]\n")
    assert parse(Whole, [file, "--numbers.1", "9"], "llama2 test").numbers == (3, 9, 5)
    assert merge([{"a": 1, "b": 2}, {"a": 3}], {"0": {"b": 5}}) == [{"a": 1, "b": 5}, {"a": 3}]

    with pytest.raises(UserError, match=r"'numbers.3': there are 3 of them"):
        parse(Whole, [file, "--numbers.3", "9"], "llama2 test")


def test_yaml_merge_keys_may_be_overridden(tmp_path):
    file = recipe(
        tmp_path, "out: x\nsets:\n  a: &a {path: p, weight: 2}\n  b: {<<: *a, weight: 3}\n"
    )
    assert parse(Whole, [file], "llama2 test").sets["b"] == Set(path=Path("p"), weight=3)


# --- values ---


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+3", 1e3), (".5", 0.5), ("4.0e-3", 4e-3), ("-2e2", -200.0)],
)
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text, value):
    assert read_yaml(Path(recipe(tmp_path, f"a: {text}\nb: [{text}]"))) == {
        "a": value,
        "b": [value],
    }
    if value > 0:
        assert from_flags("--inner.rate", text).inner.rate == value


@pytest.mark.parametrize(
    "text", ["Run: the first", "yes", "2024", "1.10", "12:30", "- x", "# 1", "", "{a}", "null x"]
)
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


# --- values are what they say ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("4:20", "4:20"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("True", True),
        ("FALSE", False),
        ("2001-01-01", "2001-01-01"),
        ("~", None),
        ("null", None),
        ("1e-4", 1e-4),
        ("+12", 12),
        ("1.", 1.0),
        ("0b11", "0b11"),
        ("'1'", "1"),
        ("!!str 1", "1"),
    ],
)
def test_words_are_read_as_yaml_1_2(tmp_path, text, value):
    found = read_yaml(Path(recipe(tmp_path, f"a: {text}\nb: [{text}]")))
    assert found == {"a": value, "b": [value]}
    assert type(found["a"]) is type(value)


def test_keys_are_names_as_they_were_written(tmp_path):
    found = read_yaml(
        Path(recipe(tmp_path, "2023: 1\non: 2\nnull: 3\n~: 4\n010: 5\ntrue: 6\n1.10: 7\n"))
    )
    assert found == {"2023": 1, "on": 2, "null": 3, "~": 4, "010": 5, "true": 6, "1.10": 7}


def test_what_is_written_is_read_back_by_both_versions_of_yaml():
    value = {
        "a": "1e5",
        "b": "0o10",
        "c": "yes",
        "d": "010",
        "2023": "2001-01-01",
        "null": None,
        "on": "4:20",
        "f": 1e-5,
        "g": "0x1F",
        "h": ".5",
        "i": ["~", "<<", "", "1_0"],
        "j": 1.0,
        "k": True,
        "l": "true",
    }
    assert yaml12.load(yaml12.dump(value)) == value
    assert yaml.safe_load(yaml12.dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", r":1: not valid YAML \(found unconstructable recursive node\)"),
        ("a: !!timestamp 2001-01-01", r":1: .*no use for the tag '!!timestamp'"),
        ("a: !!python/object/apply:os.system [id]", r":1: .*no use for the tag"),
        ("a: " + "1" * 5000, r":1: .* is no whole number"),
        ("a: 1\nb: !!map 3", r":2: .*this is no mapping"),
        ("a: !!seq 3", r":1: .*this is no list"),
        ("a: !!bool maybe", r":1: .*'maybe' is neither true nor false"),
        ("a: !!null x", r":1: .*'x' is not null"),
        ("a: !!int {b: 1}", r":1: .*a list or mapping where its tag says otherwise"),
        (r'a: "\U99999999"', r"recipe.yaml: .*an escape \\U that names no character"),
        (r'a: "\ud800"', r":1: .*half of a character"),
        (r'"\ud800": a', r":1: .*half of a character"),
        ("a: 1\nb: 2\x07\n", r":2: a character that no text has \(code 7\); take it out"),
        ("a: 1\n---\nb: 2\n", r":2: .*a second document begins here\); a recipe is one"),
        ("a:\n\tb: 2\n", r":2: .*a tab stands where YAML takes spaces alone\); write spaces"),
        ("a: " + "[" * 2000 + "]" * 2000, r":1: .*more than 50 levels of nesting"),
        (
            "\n".join(
                [
                    "a0: &a0 [x,x,x,x,x,x,x,x,x,x]",
                    *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)),
                ]
            ),
            r":5: .*with its aliases written out it holds more than 100,000 values",
        ),
    ],
)
def test_yaml_that_is_a_trap_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_yaml(Path(recipe(tmp_path, text)))


@pytest.mark.parametrize("verb", VERBS)
def test_true_is_no_number_in_any_verb(verb):
    """Every key of every verb that takes a number refuses true, in a file and as a flag, and so
    does a flag alone."""
    kind = launch.load(verb).Config
    keys = [
        (names, annotation)
        for names, annotation in schema.list_leaves(kind)
        if {int, float}
        & {
            inner
            for one in schema.list_types(annotation)
            for inner in schema.list_types(
                schema.find_item_type(one, 0) if schema.takes_several(one) else one
            )
        }
    ]
    for names, annotation in keys:
        if set(schema.list_types(annotation)) & {bool, str}:
            continue

        several = schema.takes_several(annotation)
        values: Any = [True] if several else True
        for name in reversed(names):
            values = {name: values}

        with pytest.raises(UserError, match=r"number|'true'") as error:
            build(kind, values)

        assert ".".join(names) in error.value.cause, names
        flag = f"--{schema.spell_flag(*names)}"
        with pytest.raises(UserError, match=f"'{flag[2:]}' needs a value; write {flag} NUMBER"):
            parse(kind, [flag], "llama2")

        with pytest.raises(UserError, match=f"'{flag}': a"):
            parse(kind, [flag, "true"], "llama2")

    assert keys or verb in ("report", "import")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit: true", "'limit': a whole number or null is wanted (it is true)"),
        ("limit: 1.5", "'limit': a whole number or null is wanted (it is 1.5)"),
        ("limit: yes", "'limit': a whole number or null is wanted (it is 'yes')"),
        ("limit: '1_000'", "'limit': a whole number or null is wanted (it is '1_000')"),
        ("inner: {rate: .inf}", "'inner.rate': must be a finite number (it is inf)"),
        ("inner: {rate: .nan}", "'inner.rate': must be a finite number (it is nan)"),
        ("inner: {rate: 1e999}", "'inner.rate': must be a finite number (it is inf)"),
        ("inner: {on: 1}", "'inner.on': true or false is wanted (it is 1); write true or false"),
        (
            "inner: {on: yes}",
            "'inner.on': true or false is wanted (it is 'yes'); write true or false",
        ),
        ("inner: {name: true}", "'inner.name': text is wanted (it is true); put it in quotes"),
        ("inner: {name: 2024}", "'inner.name': text is wanted (it is 2024); put it in quotes"),
        ("numbers: [1, false]", "'numbers.1': a number is wanted (it is false)"),
        ("numbers: [1, .inf]", "'numbers.1': must be a finite number (it is inf)"),
        (
            "limit: 9223372036854775808",
            "'limit': must be at most 9223372036854775807 (it is 9223372036854775808)",
        ),
        ("limit: 1e30", "'limit': must be at most 9223372036854775807 (it is "),
        ("inner: {rate: 1" + "0" * 400 + "}", "'inner.rate': a number is wanted (it is 1000"),
        ("numbers: 3", "'numbers': a list is wanted (it is 3); write [3]"),
        ("mixed: {a: true}", "'mixed.a': text or a number is wanted (it is true)"),
        ("mixed: {a: [1]}", "'mixed.a': text or a number is wanted (it is [1])"),
        ("some: {path: true}", "'some.path': a path is wanted (it is true)"),
        ("seed: -1", "'seed': must be at least 0 (it is -1)"),
        ("seed: 4294967296", "'seed': must be at most 4294967295 (it is 4294967296)"),
        (
            "sets: d.jsonl",
            "'sets' is a mapping (it is 'd.jsonl'); write sets: {NAME: {path: 'd.jsonl'}}",
        ),
        ("sets: {a: d.jsonl}", "'sets.a' is a mapping (it is 'd.jsonl'); write a: {path: PATH}"),
        ("inner: 3", "'inner' is a mapping (it is 3); write inner: {rate: NUMBER}"),
        ("colour: blue", "'colour': must be 'red' or 'green' (it is 'blue')"),
    ],
)
def test_a_value_of_another_kind_is_named_in_plain_words(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse(
            Whole,
            [recipe(tmp_path, f"out: x\n{text}\n")] if not text.startswith("out") else [],
            "llama2 test",
        )

    assert message in str(error.value)
    assert "nput should" not in str(error.value)


def test_numbers_that_say_what_they_are():
    assert build(Whole, {"out": "x", "limit": 2.0, "inner": {"rate": 1}}).limit == 2
    assert build(Whole, {"out": "x", "limit": "2", "inner": {"rate": "1e-4"}}).inner.rate == 1e-4
    assert build(Whole, {"out": "x", "mixed": {"a": "2", "b": 2, "c": 2.0}}).mixed == {
        "a": "2",
        "b": 2,
        "c": 2.0,
    }
    assert from_flags("--mixed.a", "1.10", "--mixed.b", "010", "--mixed.c", "2.5").mixed == {
        "a": "1.10",
        "b": "010",
        "c": 2.5,
    }


def test_a_seed_for_every_name():
    seeds = [
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a1"),
        derive_seed(0, "a", "b"),
        derive_seed(0, "a,b"),
        derive_seed(2**32 - 1, "a"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= 2**32 - 1 for seed in seeds)
    assert derive_seed(0, "rejection2") == 3378867910


# --- names and paths ---


def test_names_that_users_chose_are_kept_letter_by_letter(tmp_path):
    file = recipe(
        tmp_path, "out: x\nsets: {open-assistant: {path: p}, b_c: {path: q}, v1.5: {path: r}}\n"
    )
    config = parse(
        Whole,
        [
            file,
            "--sets.open-assistant.weight",
            "2",
            "--sets.b_c.weight",
            "3",
            "--sets.v1.5.weight",
            "4",
            "--sets.new-one.path",
            "s",
            "--mixed.my-data",
            "d",
        ],
        "llama2 test",
    )
    assert {name: one.weight for name, one in config.sets.items()} == {
        "open-assistant": 2,
        "b_c": 3,
        "v1.5": 4,
        "new-one": 1,
    }
    assert config.mixed == {"my-data": "d"}

    with pytest.raises(
        UserError,
        match=r"'sets.open_assistant.path' is required; did you mean "
        r"'sets.open-assistant.path'\?",
    ):
        parse(Whole, [file, "--sets.open_assistant.weight", "2"], "llama2 test")


def test_a_shape_is_said_by_fields_and_a_mixture_by_names():
    words = [
        "--out",
        "x",
        "--shards",
        "s",
        "--architecture.hidden-size",
        "64",
        "--mixture.my-web",
        "0.5",
    ]
    found = parse(pretrain.Config, words, "llama2 pretrain")
    assert found.architecture.model_dump(exclude_none=True) == {"hidden_size": 64}
    assert found.mixture == {"my-web": 0.5}
    shape = pretrain.architecture(found.model_copy(update={"size": "tiny"}), 500)
    assert (shape.vocab_size, shape.hidden_size) == (500, 64)

    with pytest.raises(
        UserError,
        match=r"unknown flag '--architecture.hidden-sizes'; did you mean "
        r"'--architecture.hidden-size'\?",
    ):
        parse(pretrain.Config, [*words, "--architecture.hidden-sizes", "3"], "llama2 pretrain")

    with pytest.raises(
        UserError, match=r"'architecture.num_hidden_layers': a whole number or null is wanted"
    ):
        build(
            pretrain.Config,
            {"out": "x", "shards": "s", "architecture": {"num_hidden_layers": True}},
        )


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "..",
        ".",
        "",
        "/etc",
        ".hidden",
        "a\\b",
        "a\nb",
        "a\x1b[2J",
        "a\u202eb",
        "a\0",
        "a ",
        "a.",
        "a\ud800",
    ],
)
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(UserError, match=r"sets: '.*' is no name; choose one without '/'"):
        build(Whole, {"out": "x", "sets": {name: {"path": "p"}}})


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["con"], "'con' names a device on some systems"),
        (["NUL.txt"], "'NUL.txt' names a device"),
        (["Lpt1"], "'Lpt1' names a device"),
        (["web", "Web"], "the names 'web' and 'Web' are one file on some systems"),
        (["\u00e9", "e\u0301"], "are one file on some systems"),
        (["x" * 201], "'xxxxxxxxxxxxxxxxxxxx' is too long"),
        (["\u00e9" * 101], "is too long for a file; choose one of at most 200 bytes"),
    ],
)
def test_names_that_cannot_stand_side_by_side_everywhere_are_refused(names, why):
    with pytest.raises(UserError, match=f"sets: .*{why}"):
        build(Whole, {"out": "x", "sets": {name: {"path": "p"} for name in names}})

    build(
        Whole,
        {
            "out": "x",
            "sets": {name: {"path": "p"} for name in ["console", "c4:en", "\u00e9" * 100, "a b"]},
        },
    )


def test_home_is_written_out_and_variables_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = build(
        Whole,
        {
            "out": "~/runs/x",
            "sets": {"a": {"path": "~/a.jsonl"}, "b": {"path": "b~/~"}},
            "some": {"path": "~"},
            "files": ["~/c", "d"],
        },
    )
    assert config.out == Path("/home/ann/runs/x")
    assert [one.path for one in config.sets.values()] == [Path("/home/ann/a.jsonl"), Path("b~/~")]
    assert config.some == Set(path=Path("/home/ann"))
    assert config.files == (Path("/home/ann/c"), Path("d"))
    assert build(Whole, {"out": "~root/x"}).out == Path("~root/x").expanduser() != Path("~root/x")

    with pytest.raises(
        UserError, match=r"'out': ~nobody-here/x: there is no such home directory; write it out"
    ):
        build(Whole, {"out": "~nobody-here/x"})

    for text in ("$HOME/a", "x/${DATA}/b"):
        with pytest.raises(
            UserError, match=r"'sets.a.path': .*: variables of the shell are not known here"
        ):
            build(Whole, {"out": "x", "sets": {"a": {"path": text}}})

    (tmp_path / "$RECYCLE").touch()
    build(Whole, {"out": "x", "some": {"path": tmp_path / "$RECYCLE"}})


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner.rat", "1"], "unknown flag '--inner.rat'; did you mean '--inner.rate'?"),
        (["--inner.rate", "0"], "'--inner.rate': must be greater than 0 (it is 0); mend the value"),
        (
            ["--sets.a.wieght", "1"],
            "unknown flag '--sets.a.wieght'; did you mean '--sets.a.weight'?",
        ),
        (
            ["--sets.a.weight", "1"],
            "'sets.a.path' is required; give --sets.a.path PATH or set it in the recipe",
        ),
        (["--some.paht", "x"], "unknown flag '--some.paht'; did you mean '--some.path'?"),
        (["--limit", "many"], "'--limit': a whole number or null is wanted (it is many)"),
        (["--titel=x"], "unknown flag '--titel'; did you mean '--title'?"),
        (["loose"], "unexpected argument 'loose' behind --out x; a recipe stands before all flags"),
        (["--seed=1", "loose"], "unexpected argument 'loose'; a recipe stands before all flags"),
        (["--inner", "1", "--inner.rate", "2"], "--inner.rate and --inner are both given"),
        (
            ["--numbers", "1", "2", "--numbers=3"],
            "--numbers is given twice (1 2, 3); give all behind one: --numbers 1 2 3",
        ),
        (
            ["--sets.a.path", "p", "--sets.a.path", "q"],
            "--sets.a.path is given twice (p, q); leave one out, or give the",
        ),
        (
            ["--seed", "1", "-limit", "2"],
            "unexpected argument '-limit' behind --seed 1; flags begin with two dashes",
        ),
        (["--LIMIT", "2"], "unknown flag '--LIMIT'; did you mean '--limit'?"),
        (["--ranks", "8"], "unknown flag '--ranks'; it is for a dry run: add --dry-run"),
        (["--some.path", ""], "'--some.path': a path is wanted (it is ''); mend the value"),
        (["--files", "a", " "], "'--files': a path is wanted (it is ' '); mend the value"),
        (["--inner.rate", "2", "--inner", "1"], "--inner and a key below it are both given"),
        (["--seed", "-1.5"], "'--seed': a whole number is wanted (it is -1.5)"),
        (
            ["--seed", "1700000000000000000"],
            "'--seed': must be at most 4294967295 (it is 1700000000000000000)",
        ),
        (
            ["--quiet"],
            "unknown flag '--quiet'; known: --colour, --files, --inner, --limit, --mixed, --numbers, --out",
        ),
        (["--rate", "1"], "unknown flag '--rate'; did you mean '--inner.rate'?"),
        (["--inner.seed", "1"], "unknown flag '--inner.seed'; did you mean '--seed'?"),
        (["--seed"], "'seed' needs a value; write --seed NUMBER"),
        (["--title"], "'title' needs a value; write --title TEXT"),
        (["--numbers"], "'numbers' needs a value; write --numbers NUMBER ..."),
        (["--sets"], "'sets' needs a value; write --sets.NAME.path PATH"),
        (["--seed", ""], "'--seed': a whole number is wanted (it is '')"),
        (["--no-seed"], "unknown flag '--no-seed'; did you mean '--seed'?"),
        (
            ["--sets", "d.jsonl"],
            "'--sets' needs a name for what it is given (it is d.jsonl); use --sets.NAME.path d.jsonl",
        ),
        (["--inner", "3"], "'--inner' has keys of its own (it is 3); use --inner.rate NUMBER"),
        (
            ["--inner.on", "yes"],
            "'--inner.on': true or false is wanted (it is yes); write true or false",
        ),
        (["--inner.rate", "inf"], "'--inner.rate': a number is wanted (it is inf)"),
        (["--inner.rate", ".inf"], "'--inner.rate': must be a finite number (it is .inf)"),
    ],
)
def test_a_wrong_flag_is_named_with_a_cure(flags, message):
    with pytest.raises(UserError) as error:
        from_flags(*flags)

    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("verb", "flag", "meant"),
    [
        ("sft", "--learning-rate", "--training.optimizer.learning-rate"),
        ("sft", "--learning_rate", "--training.optimizer.learning-rate"),
        ("sft", "--lr", "--training.optimizer.learning-rate"),
        ("sft", "--training.optimizer.lr", "--training.optimizer.learning-rate"),
        ("sft", "--training.lr", "--training.optimizer.learning-rate"),
        ("sft", "--optimizer.learning-rate", "--training.optimizer.learning-rate"),
        ("sft", "--training.optimiser.learning-rate", "--training.optimizer.learning-rate"),
        ("sft", "--learnin-rate", "--training.optimizer.learning-rate"),
        ("sft", "--data", "--dialogs.NAME.path"),
        ("sft", "--dialog", "--dialogs.NAME.path"),
        ("reward", "--data", "--preferences.NAME.path"),
        ("pretrain", "--data", "--shards"),
        ("ppo", "--model", "--policy"),
        ("ppo", "--temperature", "--sample.temperature"),
        ("sft", "--max-steps", "--training.plan.max-steps"),
        ("sft", "--num-train-epochs", "--epochs"),
        ("sft", "--output-dir", "--out"),
        ("serve", "--dtype", "--precision"),
    ],
)
def test_a_key_that_lies_deeper_is_found(verb, flag, meant):
    with pytest.raises(UserError) as error:
        parse(
            launch.load(verb).Config,
            ["--out", "x", flag, "1"] if verb != "serve" else [flag, "1"],
            "llama2",
        )

    assert str(error.value) == f"unknown flag '{flag}'; did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "out: x\ninner: {rat: 1}",
            r"recipe.yaml: unknown key 'inner.rat'; did you mean 'inner.rate'\?",
        ),
        (
            "out: x\ninner.rate: 1",
            r"recipe.yaml: 'inner.rate': a key of a recipe has no dots; write inner: {rate: NUMBER}",
        ),
        (
            "out: x\nsteps: {a: {verb: sft}}",
            r"recipe.yaml: this recipe has steps, each with a verb of its own; write "
            r"llama2 run ",
        ),
        ("out: ''", r"'out': a path is wanted \(it is ''\)"),
        ("out: x\nrate: 1", r"recipe.yaml: unknown key 'rate'; did you mean 'inner.rate'\?"),
        (
            "out: x\ninner:\n  rate: 1\n  rate: 2\n",
            r"recipe.yaml:4: not valid YAML \(the key 'rate' is given twice\)",
        ),
        ("out: [x\n", r"recipe.yaml:2: not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("inner: {rate: 1}", "'out' is required; give --out PATH"),
        ("", "'out' is required"),
        ("extends: [a]", r"'extends' names no file"),
    ],
)
def test_a_wrong_recipe_is_named_with_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse(Whole, [recipe(tmp_path, text)], "llama2 test")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("title: café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8 .* byte 10"):
        parse(Whole, [str(tmp_path / "latin.yaml")], "llama2 test")

    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        parse(Whole, [str(tmp_path / "none.yaml")], "llama2 test")


def test_recipes_saved_on_windows_are_read(tmp_path):
    (tmp_path / "r.yaml").write_bytes("\ufeffout: x\r\ninner: {rate: 2}\r\ntitle: é\r\n".encode())
    config = parse(Whole, [str(tmp_path / "r.yaml")], "llama2 test")
    assert (config.out, config.inner.rate, config.title) == (Path("x"), 2, "é")


def test_extends_is_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    recipe(tmp_path, "out: x\ntitle: under\ninner: {rate: 2}\n")
    (tmp_path / "sub/over.yaml").write_text(
        "extends: ../recipe.yaml\ntitle: over\nsome: {path: a/b}\n"
    )
    monkeypatch.chdir(tmp_path / "sub")
    config = parse(Whole, ["over.yaml"], "llama2 test")
    assert (config.title, config.inner.rate, config.some) == ("over", 2, Set(path=Path("a/b")))


def test_of_a_flag_given_twice_the_last_counts():
    config = from_flags("--seed", "1", "--title", "a", "--seed=2", "--out", "y")
    assert (config.seed, config.out) == (2, Path("y"))


def test_what_is_no_recipe_is_told_where_it_goes(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    recipe(tmp_path, "out: x\n")
    (tmp_path / "empty").mkdir()
    flag = "give data and models behind a flag, such as --sets.NAME.path"

    for name, cure in (
        ("chats.jsonl", f"{flag} {tmp_path}/chats.jsonl"),
        ("empty", f"{flag} {tmp_path}/empty"),
        ("", f"did you mean {tmp_path}/recipe.yaml?"),
    ):
        with pytest.raises(UserError, match="what stands before all flags is a recipe") as error:
            parse(Whole, [str(tmp_path / name)], "llama2 test")

        assert error.value.cure == cure


def test_a_dash_alone_is_no_flag():
    with pytest.raises(UserError, match="unexpected argument '--'"):
        from_flags("--")


# --- help and inputs ---


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_key_of_a_verb(verb, capsys):
    with pytest.raises(SystemExit) as left:
        launch.run_command(verb, ["--help"])

    assert left.value.code == 0
    shown = capsys.readouterr().out
    fields = {
        field.alias or name for name, field in launch.load(verb).Config.model_fields.items()
    } - {"steps", "variants"}
    assert [
        name for name in sorted(fields) if f"--{name.replace('_', '-').rstrip('-')}" not in shown
    ] == []


def test_help_breaks_the_lines_of_a_description_itself():
    class Wide(Config):
        key: int = 0
        """what fills
        two lines of the source"""

    assert Wide.model_fields["key"].description == "what fills two lines of the source"


def test_every_path_but_out_is_an_input():
    config = build(Whole, {"out": "o", "sets": {"a": {"path": "p"}}, "some": {"path": "q"}})
    assert dict(list_paths(config)) == {"sets.a.path": Path("p"), "some.path": Path("q")}


def test_a_path_with_a_nul_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text('out: "a\\0b"\nshards: s\n')
    with pytest.raises(UserError, match=r"a\.yaml: 'out': a\\x00b: no path has a NUL in it"):
        parse(pretrain.Config, [str(tmp_path / "a.yaml")], "llama2 pretrain")


def test_a_long_word_is_not_repeated_in_full(tmp_path):
    with pytest.raises(UserError) as error:
        parse(
            pretrain.Config,
            ["--out", "x", "--shards", "s", "--batch-size", "9" * 5000 + "x"],
            "llama2 pretrain",
        )

    assert len(str(error.value)) < 300
