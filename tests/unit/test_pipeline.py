"""Recipes: references and lineage, mistakes before any work, order, cores, and how one ends."""

import os
import shutil
import signal
import threading
import time

import pytest
import yaml
from commands import llama2

from llama2 import runs
from llama2.config import build, derive_seed, parse
from llama2.errors import UserError
from llama2.recipe import pipeline
from llama2.recipe.workers import Workers


def recipe(tmp_path, steps, **more):
    return build(pipeline.Config, {"out": tmp_path / "run", "cores": 2, "steps": steps, **more})


def worlds(count, **common):
    """Steps that take a fraction of a second."""
    one = {"verb": "world", "cores": 1, "scale": 0.001, **common}
    return {f"w{index}": {**one, "seed": index} for index in range(count)}


# --- references ---


def test_references_become_run_directories_and_lineage(tmp_path):
    made = recipe(
        tmp_path,
        {
            "base": {"verb": "world"},
            "judge": {"verb": "world"},
            "tune": {
                "verb": "sft",
                "model": "${base}",
                "processes": 2,
                "seconds": 7,
                "epochs": "${passes}",
                "dialogs": {
                    "a": {"path": "${data}/a.jsonl"},
                    "b": {"path": "${judge}/b-${tag}.jsonl"},
                },
            },
            "report": {"verb": "report", "recipe": "${out}", "after": ["${tune}"]},
        },
        parameters={"data": "/my/data", "passes": 3, "tag": 5},
        seed=4,
    )
    steps = pipeline.resolve_steps(made)
    tune = steps["tune"]
    assert tune.needs == {"base", "judge"}
    assert (tune.keys.processes, tune.keys.seconds, tune.out) == (2, 7.0, tmp_path / "run/tune")
    assert tune.values["model"] == str(tmp_path / "run/base")
    paths = {name: one["path"] for name, one in tune.values["dialogs"].items()}
    assert paths == {"a": "/my/data/a.jsonl", "b": f"{tmp_path}/run/judge/b-5.jsonl"}
    assert tune.values["epochs"] == 3  # a whole reference keeps its type
    assert tune.values["seed"] == derive_seed(4, "tune")
    assert steps["report"].values["recipe"] == str(tmp_path / "run")
    assert steps["report"].needs == {"tune"}
    assert steps["base"].needs == frozenset()


def test_every_step_draws_its_own_seed(tmp_path):
    """Else a version that was not kept would be sampled again with the very same draws in the next
    round."""
    given = {"a": {"verb": "world", "seed": 9}, "b": {"verb": "world"}, "c": {"verb": "world"}}
    seeds = [
        step.values["seed"]
        for step in pipeline.resolve_steps(recipe(tmp_path, given, seed=1)).values()
    ]
    assert seeds == [9, derive_seed(1, "b"), derive_seed(1, "c")]
    assert len(set(seeds)) == 3
    other = [
        step.values["seed"]
        for step in pipeline.resolve_steps(recipe(tmp_path, given, seed=2)).values()
    ]
    assert other[0] == 9
    assert not set(seeds[1:]) & set(other[1:])


def test_a_run_of_another_seed_is_named(tmp_path):
    pipeline.run(recipe(tmp_path, {"w": {"verb": "world", "cores": 1, "scale": 0.001, "seed": 0}}))
    with pytest.raises(
        UserError,
        match=rf"a finished run with another configuration: seed: 0 -> {derive_seed(0, 'w')}",
    ):
        pipeline.run(recipe(tmp_path, {"w": {"verb": "world", "cores": 1, "scale": 0.001}}))


def test_names_with_dashes_and_dots_are_referred_to(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "out": "x",
                "parameters": {"my-data": "/d", "on": True, "v": 1.5},
                "steps": {
                    "sft-a": {"verb": "world"},
                    "v1.5": {"verb": "world"},
                    "sft-b": {
                        "verb": "sft",
                        "model": "${sft-a}",
                        "dialogs": {"open-assistant": {"path": "${my-data}/${v}.jsonl"}},
                        "training": {"compile": "${on}"},
                    },
                    "c": {"verb": "clean", "sources": {"a": {"path": "${v1.5}/a-${on}"}}},
                },
            },
            sort_keys=False,
        )
    )
    flags = [
        "--steps.sft-b.sequence-length",
        "64",
        "--steps.sft-b.dialogs.open-assistant.weight",
        "2",
        "--steps.v1.5.scale",
        "0.5",
        "--parameters.my-data",
        "/e",
        "--steps.sft-b.training.no-compile",
        "--steps.sft-b.dialogs.my-own.path",
        "f.jsonl",
    ]
    steps = pipeline.resolve_steps(parse(pipeline.Config, [str(file), *flags], "llama2 run"))
    assert steps["sft-b"].needs == {"sft-a"}
    assert steps["sft-b"].values["dialogs"] == {
        "open-assistant": {"path": "/e/1.5.jsonl", "weight": 2},
        "my-own": {"path": "f.jsonl"},
    }
    assert (steps["sft-b"].values["sequence_length"], steps["sft-b"].values["training"]) == (
        64,
        {"compile": False},
    )
    assert steps["v1.5"].values["scale"] == 0.5
    assert steps["c"].values["sources"]["a"]["path"] == "x/v1.5/a-true"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--parameters.dta", "/e"],
            "parameters.dta: no step refers to '${dta}'; did you mean 'data'?",
        ),
        (
            ["--steps.sft_b", "null"],
            "steps.sft_b: there is no such step to leave out; did you mean 'sft-b'?",
        ),
        (
            ["--steps.sft_b.epochs", "1"],
            "steps.sft_b: there is no such step, and a new one needs a verb; did you mean 'sft-b'?",
        ),
        (
            ["--steps.pretrian.epochs", "1"],
            "steps.pretrian: there is no such step, and a new one needs a verb; known: ",
        ),
        (
            ["--steps.sft-b.learning-rate", "1"],
            "unknown flag '--steps.sft-b.learning-rate'; did you mean "
            "'--steps.sft-b.training.optimizer.learning-rate'?",
        ),
        (
            ["--steps.sft-b.epochs"],
            "'steps.sft-b.epochs' needs a value; write --steps.sft-b.epochs NUMBER",
        ),
        (
            ["--steps.sft-b.epochs", "true"],
            "steps.sft-b: 'epochs': a whole number is wanted (it is true)",
        ),
        (
            ["--steps.sft-b.epochs", "1", "more.yaml"],
            "unexpected argument 'more.yaml' behind --steps.sft-b.epochs 1",
        ),
        (
            ["--steps.sft-b.processes", "true"],
            "steps.sft-b: 'processes': a whole number is wanted (it is true)",
        ),
        (
            ["--steps.sft-b.out", "x"],
            "steps.sft-b: a step writes to the recipe's directory, so it has no 'out'",
        ),
        (["--parameters.data"], "'parameters.data' needs a value; write --parameters.data TEXT"),
        (
            ["--parameters.data", "a${b}"],
            "steps.sft-b.dialogs.m.path: a reference is left over in 'a${b}'",
        ),
        (["--steps.a/b.verb", "world"], "steps: 'a/b' is no name"),
        (["--steps.logs.verb", "world"], "steps: the name 'logs' is taken in every recipe"),
        (
            ["--parameters", "3"],
            "'--parameters' needs a name for what it is given (it is 3); use --parameters.NAME 3",
        ),
        (["--dry-rn"], "unknown flag '--dry-rn'; known: --awaits, --cores"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(tmp_path, flags, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "out": str(tmp_path / "run"),
                "parameters": {"data": "/d"},
                "steps": {
                    "sft-b": {"verb": "sft", "model": "m", "dialogs": {"m": {"path": "${data}"}}}
                },
            }
        )
    )
    with pytest.raises(UserError) as error:
        pipeline.resolve_steps(parse(pipeline.Config, [str(file), *flags], "llama2 run"))

    assert str(error.value).startswith(message)


def test_a_parameter_of_a_step_that_is_left_out_may_stay(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "out": str(tmp_path / "run"),
                "parameters": {"data": "/d"},
                "steps": {
                    "b": {"verb": "clean", "sources": {"m": {"path": "${data}"}}},
                    **worlds(1),
                },
            }
        )
    )
    pipeline.run(parse(pipeline.Config, [str(file), "--steps.b", "null"], "llama2 run"))
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert (list(written["steps"]), written["parameters"]) == (["w0"], {})
    assert (
        pipeline.run(parse(pipeline.Config, [str(tmp_path / "run/recipe.yaml")], "llama2 run")) == 0
    )


def test_a_recipe_is_asked_for(one_line):
    assert one_line("run") == "a recipe is needed; name one: llama2 run recipes/demo/recipe.yaml"
    assert one_line("run", "--out", "x", "--dry-run").startswith("a recipe is needed")


def test_all_missing_inputs_are_named_before_any_work(tmp_path):
    steps = {
        "w": {"verb": "world", "cores": 2, "scale": 0.001},
        "a": {
            "verb": "clean",
            "cores": 1,
            "sources": {"x": {"path": "none/x"}, "y": {"path": "${w}/documents"}},
        },
        "b": {
            "verb": "clean",
            "cores": 1,
            "sources": {"z": {"path": "none/z.jsonl"}, "g": {"path": "n/*.txt"}},
        },
        "c": {
            "verb": "clean",
            "cores": 1,
            "sources": {"l": {"path": str(tmp_path / "later/l.jsonl")}},
        },
    }
    with pytest.raises(UserError) as error:
        pipeline.run(recipe(tmp_path, steps))

    assert error.value.cause == (
        f"3 inputs are missing: none/x (steps.a.sources.x.path), none/z.jsonl "
        f"(steps.b.sources.z.path), {tmp_path}/later/l.jsonl (steps.c.sources.l.path)"
    )
    del steps["a"], steps["b"]
    with pytest.raises(UserError) as error:
        pipeline.run(recipe(tmp_path, steps))

    assert error.value.cause == f"{tmp_path}/later/l.jsonl: no such file or directory"
    assert not (tmp_path / "run").exists()
    awaited = recipe(tmp_path, steps, parameters={"hand": str(tmp_path)}, awaits=["${hand}/later"])

    with pytest.raises(UserError, match=r"step c: .*later/l.jsonl: no such file"):
        pipeline.run(awaited)

    assert (tmp_path / "run/w/COMPLETE").exists()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"a": {"verb": "wrld"}}, r"steps.a: unknown verb 'wrld'; did you mean 'world'\?"),
        (
            {"a": {"scale": 1}},
            r"steps.a: there is no such step, and a new one needs a verb; known: ",
        ),
        (
            {"tune": {"verb": "world"}, "tne": {"scale": 1}},
            r"steps.tne: .* needs a verb; did you mean 'tune'\?",
        ),
        (
            {"a": {"verb": "sft", "learning_rate": 1}},
            r"steps.a: unknown key 'learning_rate'; did you mean "
            r"'training.optimizer.learning_rate'\?",
        ),
        (
            {"a": {"verb": "sft", "dialogs": {"m": {"path": "p"}}}},
            r"steps.a: 'model' is required; give --steps.a.model PATH",
        ),
        (
            {"a": {"verb": "sft", "model": "m"}},
            r"steps.a: 'dialogs' is required; give --steps.a.dialogs.NAME.path PATH",
        ),
        ({"a": {"verb": "world", "out": "x"}}, r"steps.a: a step writes to the recipe's directory"),
        ({"a/b": {"verb": "world"}}, r"steps: 'a/b' is no name"),
        ({"..": {"verb": "world"}}, r"steps: '\.\.' is no name"),
        ({"": {"verb": "world"}}, r"steps: '' is no name"),
        ({"/tmp": {"verb": "world"}}, r"steps: '/tmp' is no name"),
        ({"CON": {"verb": "world"}}, r"steps: 'CON' names a device on some systems"),
        ({"Logs": {"verb": "world"}}, r"steps: the name 'Logs' is taken in every recipe"),
        (
            {"world": {"verb": "world"}, "World": {"verb": "world"}},
            r"steps: the names 'world' and 'World' are one file",
        ),
        ({"recipe.yaml": {"verb": "world"}}, r"steps: the name 'recipe.yaml' is taken"),
        ({"out": {"verb": "world"}}, r"steps: the name 'out' is taken"),
        ({"a}": {"verb": "world"}}, r"steps: nothing can refer to 'a\}'"),
        (
            {"a": {"verb": "clean", "sources": {"x": {"path": "${data"}}}},
            r"steps.a.sources.x.path: '\$\{data' holds what",
        ),
        (
            {"a": {"verb": "clean", "sources": {"${data}": {"path": "x"}}}},
            r"steps.a.sources: '\$\{data\}' holds what is",
        ),
        (
            {"a": {"verb": "clean", "sources": {"x": {"path": "${}"}}}},
            r"steps.a.sources.x.path: '\$\{\}' is neither",
        ),
        (
            {"a": {"verb": "clean", "sources": {"x": {"path": "${HOME}/x"}}}},
            r"'\$\{HOME\}' is neither a parameter nor",
        ),
        (
            {"a": {"verb": "clean", "sources": {"x": {"path": "$HOME/x"}}}},
            r"steps.a: 'sources.x.path': \$HOME/x: variables",
        ),
        ({"a": {"verb": "chat"}}, r"steps.a: unknown verb 'chat'"),  # it makes no run
        ({"a": {"verb": "run"}}, r"steps.a: unknown verb 'run'"),
        (
            {"a": {"verb": "world", "scal": 1}},
            r"steps.a: unknown key 'scal'; did you mean 'scale'\?",
        ),
        ({"a": {"verb": "world", "scale": 3}}, r"steps.a: 'scale': must be at most 1 \(it is 3\)"),
        (
            {"a": {"verb": "world", "processes": 0}},
            r"steps.a: 'processes': must be greater than 0 \(it is 0\)",
        ),
        (
            {
                "a": {"verb": "tokenize", "documents": "${b}", "tokenizer": "t"},
                "b": {"verb": "world"},
            },
            r"steps.a.documents: '\$\{b\}' is neither a parameter nor an earlier step; known: ",
        ),
        (
            {
                "world": {"verb": "world"},
                "b": {"verb": "tokenize", "documents": "${wrld}", "tokenizer": "t"},
            },
            r"steps.b.documents: '\$\{wrld\}' is neither .*; did you mean 'world'\?",
        ),
        (
            {"a": {"verb": "tokenize", "documents": "${a}", "tokenizer": "t"}},
            r"steps.a.documents: '\$\{a\}' is neither .*; known: data; it is this step itself",
        ),
        (
            {
                "a": {"verb": "tokenize", "documents": "${b}", "tokenizer": "t"},
                "b": {"verb": "world"},
            },
            r"steps.a.documents: .*; that step comes later: put it before this one",
        ),
        (
            {"b": None, "a": {"verb": "tokenize", "documents": "${b}", "tokenizer": "t"}},
            r"steps.a.documents: .*; that step is left out: give what it would have made, --parameters.b PATH",
        ),
        ({"a": {"verb": "export"}}, r"steps.a: unknown verb 'export' for a step: it leaves no run"),
        ({"a": {"verb": "SFT"}}, r"steps.a: unknown verb 'SFT'; did you mean 'sft'\?"),
        (
            {"a": {"verb": "world", "process": 2}},
            r"steps.a: unknown key 'process'; did you mean 'processes'\?",
        ),
        ({}, "the recipe has no steps"),
        ({"data": {"verb": "world"}}, r"'data' is both a step and a parameter"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, steps, message):
    with pytest.raises(UserError, match=message):
        pipeline.run(recipe(tmp_path, steps, parameters={"data": "/d"}))

    assert not (tmp_path / "run").exists()


def test_a_step_is_changed_or_left_out_on_the_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"out": "x", "steps": {**worlds(2), "b": {"verb": "world"}}}))
    made = parse(
        pipeline.Config, [str(file), "--steps.w1.scale", "0.5", "--steps.b", "null"], "llama2 run"
    )
    steps = pipeline.resolve_steps(made)
    assert list(steps) == ["w0", "w1"]
    assert steps["w1"].values["scale"] == 0.5


# --- a run ---


def test_steps_start_when_what_they_need_is_done_and_cores_are_free(tmp_path, monkeypatch, capsys):
    """Two of three independent steps fit on two cores; the fourth waits for the first."""
    log = []
    start, result = Workers.start.__func__, Workers.result
    monkeypatch.setattr(
        Workers,
        "start",
        classmethod(
            lambda cls, verb, values, *rest: (
                log.append(("start", os.path.basename(values["out"]))),
                start(cls, verb, values, *rest),
            )[1]
        ),
    )
    monkeypatch.setattr(
        Workers, "result", lambda self: (log.append(("end", self.log.stem)), result(self))[1]
    )
    steps = worlds(3)
    steps["late"] = {
        "verb": "clean",
        "cores": 1,
        "min_characters": 0,
        "sources": {"a": {"path": "${w0}/documents/lists.jsonl"}},
    }
    pipeline.run(recipe(tmp_path, steps))
    order = [name for what, name in log if what == "start"]
    assert order[:2] == ["w0", "w1"]
    assert sorted(order) == ["late", "w0", "w1", "w2"]
    assert log.index(("end", "w0")) < log.index(("start", "late"))
    running, most = 0, 0

    for what, _ in log:
        running += 1 if what == "start" else -1
        most = max(most, running)

    assert most == 2
    heard = capsys.readouterr().err.splitlines()
    assert len(heard) == 5
    assert heard[-1].startswith(f"{tmp_path / 'run'}: all 4 steps done in 0:0")
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["steps"] == steps
    assert (tmp_path / "run/logs/w0.log").exists()


def test_the_first_error_ends_the_recipe_and_keeps_what_is_done(tmp_path, capsys):
    steps = {
        **worlds(1),
        "bad": {"verb": "clean", "cores": 1, "sources": {"a": {"path": "${w0}/none.jsonl"}}},
        "never": {"verb": "tokenize", "documents": "${bad}", "tokenizer": "${w0}"},
    }
    with pytest.raises(UserError) as error:
        pipeline.run(recipe(tmp_path, steps))

    assert error.value.cause.startswith(
        f"step bad: {tmp_path}/run/w0/none.jsonl: no such file or directory; "
    )
    assert error.value.cure == "mend it and repeat the command: finished steps are kept"
    assert (tmp_path / "run/w0/COMPLETE").exists()
    assert not (tmp_path / "run/never").exists()
    steps["bad"]["sources"]["a"]["path"] = "${w0}/documents/lists.jsonl"
    steps["bad"]["min_characters"] = 0
    del steps["never"]
    pipeline.run(recipe(tmp_path, steps))  # a step that has done nothing may be corrected
    assert "all 2 steps done" in capsys.readouterr().err


def test_an_input_changed_under_a_finished_step_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("A text of some length, to be kept.")
    steps = {
        "c": {"verb": "clean", "cores": 1, "sources": {"a": {"path": str(tmp_path / "a.txt")}}}
    }
    pipeline.run(recipe(tmp_path, steps))
    (tmp_path / "a.txt").write_text("Another text of some length, to be kept.")

    with pytest.raises(
        UserError, match=r"step c: .*a finished run made from other inputs; changed: sources.a.path"
    ):
        pipeline.run(recipe(tmp_path, steps))


def test_a_step_that_is_gone_is_made_again_and_that_is_said(tmp_path, capsys):
    steps = worlds(1) | {
        name: {"verb": "clean", "cores": 1, "min_characters": 0, "sources": {"a": {"path": place}}}
        for name, place in (("c", "${w0}/documents/lists.jsonl"), ("d", "${c}/documents"))
    }
    pipeline.run(recipe(tmp_path, steps))
    assert ": gone" not in capsys.readouterr().err

    for name in ("w0", "c"):
        shutil.rmtree(tmp_path / "run" / name)

    pipeline.run(recipe(tmp_path, steps))
    heard = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in heard[:2]] == [
        f"{tmp_path}/run/{name}: gone" for name in ("w0", "c")
    ]
    assert all("though d was made from it, so it is made again" in line for line in heard[:2])
    assert "all 3 steps done" in heard[-1]


def test_two_processes_do_not_work_on_one_recipe(tmp_path):
    with (
        runs.lock(tmp_path / "run"),
        pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\)"),
    ):
        pipeline.run(recipe(tmp_path, worlds(1)))

    assert not (tmp_path / "run/recipe.yaml").exists()


def test_a_signal_stops_a_recipe_of_steps_without_checkpoints(tmp_path, capsys):
    """And its handlers are gone afterwards."""
    before = signal.getsignal(signal.SIGTERM)

    def send():
        while not (tmp_path / "run/w1/documents").exists():
            time.sleep(0.005)

        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    steps = worlds(3, scale=1.0, cores=2)
    steps["w0"]["scale"] = 0.001
    pipeline.run(recipe(tmp_path, steps))
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path / 'run'}: stopped after 1 of 3 steps; the same command resumes"
    )
    assert not (tmp_path / "run/w1/COMPLETE").exists()
    assert not (tmp_path / "run/w2").exists()


def test_a_dry_run_finds_what_a_run_would_refuse(tmp_path, one_line):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"out": str(tmp_path / "run"), "awaits": ["${w8}/a"], "steps": worlds(2)})
    )
    heard = one_line("run", file, "--dry-run")
    assert heard == "awaits: '${w8}' is neither a parameter nor an earlier step; known: w0, w1"
    heard = one_line("run", file, "--awaits", "x", "--step", "w7", "--dry-run")
    assert heard == "the recipe has no step 'w7'; known: w0, w1"


def test_one_step_alone(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "steps": worlds(2)}))
    assert llama2("run", file, "--step", "w1") == 0
    assert (tmp_path / "run/w1/COMPLETE").exists()
    assert not (tmp_path / "run/w0").exists()
    capsys.readouterr()
    assert llama2("run", file, "--step", "w7") == 2
    assert "the recipe has no step 'w7'; known: w0, w1" in capsys.readouterr().err


def test_ctrl_c_leaves_a_status_of_its_own(tmp_path, monkeypatch):
    """Unfinished is not done: `llama2 run ... && next` must not go on."""
    start = Workers.start.__func__

    def started(cls, *given):
        workers = start(cls, *given)
        os.kill(os.getpid(), signal.SIGINT)
        return workers

    monkeypatch.setattr(Workers, "start", classmethod(started))
    assert pipeline.run(recipe(tmp_path, worlds(2, scale=1.0, cores=2))) == 130
    assert not (tmp_path / "run/w1").exists()


def test_the_screen_says_what_is_left(tmp_path):
    side_by_side = recipe(tmp_path, worlds(2, seconds=100))  # a core each, of two
    board = pipeline.Board(side_by_side, pipeline.resolve_steps(side_by_side))
    assert board._picture().plain.startswith("0/2 steps  0:00 elapsed  ETA 1:40")

    steps = pipeline.resolve_steps(recipe(tmp_path, worlds(2, seconds=100, cores=2)))
    board = pipeline.Board(recipe(tmp_path, worlds(2)), steps)
    assert board._picture().plain.startswith("0/2 steps  0:00 elapsed  ETA 3:20")
    board.begin -= 50
    board.waiting.remove("w0")
    board.finished["w0"] = 50.0  # twice as fast as the recipe thought
    assert board._picture().plain.startswith("1/2 steps  0:50 elapsed  ETA 0:54")
    board.finished["w0"] = 0.0  # done before this command
    assert board._picture().plain.startswith("1/2 steps  0:50 elapsed  ETA 1:40")
