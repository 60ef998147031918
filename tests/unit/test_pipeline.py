"""Recipes: references and lineage, mistakes before any work, order, cores, and how one ends."""

import os
import signal
import threading
import time

import pytest
import yaml
from commands import llama2

from llama2 import runs
from llama2.config import build, parse
from llama2.errors import UserError
from llama2.stages import launch, pipeline


def recipe(tmp_path, steps, **more):
    return build(pipeline.Config, {"out": tmp_path / "run", "cores": 2, "steps": steps, **more})


def worlds(count, **common):
    """Steps that take a fraction of a second."""
    one = {"verb": "world", "cores": 1, "scale": 0.001, **common}
    return {f"w{index}": {**one, "seed": index} for index in range(count)}


# --- references -----------------------------------------------------------------------------------------------------


def test_references_become_run_directories_and_lineage(tmp_path):
    made = recipe(tmp_path, {
        "base": {"verb": "world"},
        "judge": {"verb": "world"},
        "tune": {"verb": "sft", "model": "${base}", "processes": 2, "seconds": 7, "epochs": "${passes}",
                 "dialogs": {"a": {"path": "${data}/a.jsonl"}, "b": {"path": "${judge}/b-${tag}.jsonl"}}},
        "report": {"verb": "report", "recipe": "${out}", "after": ["${tune}"]},
    }, parameters={"data": "/my/data", "passes": 3, "tag": 5}, seed=4)
    steps = pipeline.steps_of(made)
    tune = steps["tune"]
    assert tune.needs == {"base", "judge"}
    assert (tune.processes, tune.seconds, tune.out) == (2, 7.0, tmp_path / "run/tune")
    assert tune.values["model"] == str(tmp_path / "run/base")
    paths = {name: one["path"] for name, one in tune.values["dialogs"].items()}
    assert paths == {"a": "/my/data/a.jsonl", "b": f"{tmp_path}/run/judge/b-5.jsonl"}
    assert tune.values["epochs"] == 3  # a whole reference keeps its type
    assert tune.values["seed"] == 4
    assert steps["report"].values["recipe"] == str(tmp_path / "run")
    assert steps["report"].needs == {"tune"}
    assert steps["base"].needs == frozenset()


def test_a_step_may_have_a_seed_of_its_own(tmp_path):
    steps = pipeline.steps_of(recipe(tmp_path, {"a": {"verb": "world", "seed": 9}, "b": {"verb": "world"}}, seed=1))
    assert [step.values["seed"] for step in steps.values()] == [9, 1]


@pytest.mark.parametrize(("steps", "message"), [
    ({"a": {"verb": "wrld"}}, r"steps.a: unknown verb 'wrld'; did you mean 'world'\?"),
    ({"a": {"scale": 1}}, r"steps.a: unknown verb 'None'; known: clean, collect"),
    ({"a": {"verb": "chat"}}, r"steps.a: unknown verb 'chat'"),  # it makes no run
    ({"a": {"verb": "run"}}, r"steps.a: unknown verb 'run'"),
    ({"a": {"verb": "world", "scal": 1}}, r"steps.a: unknown key 'scal'; did you mean 'scale'\?"),
    ({"a": {"verb": "world", "scale": 3}}, r"steps.a: 'scale': Input should be less than or equal to 1 \(it is 3\)"),
    ({"a": {"verb": "world", "processes": 0}}, r"steps.a: 'processes': Input should be greater than 0"),
    ({"a": {"verb": "tokenize", "documents": "${b}", "tokenizer": "t"}, "b": {"verb": "world"}},
     r"steps.a.documents: '\$\{b\}' is neither a parameter nor an earlier step; known: "),
    ({"world": {"verb": "world"}, "b": {"verb": "tokenize", "documents": "${wrld}", "tokenizer": "t"}},
     r"steps.b.documents: '\$\{wrld\}' is neither .*; did you mean 'world'\?"),
    ({"data": {"verb": "world"}}, r"'data' is both a step and a parameter"),
])
def test_mistakes_are_found_before_any_work(tmp_path, steps, message):
    with pytest.raises(UserError, match=message):
        pipeline.run(recipe(tmp_path, steps, parameters={"data": "/d"}))
    assert not (tmp_path / "run").exists()


def test_a_step_is_changed_or_left_out_on_the_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"out": "x", "steps": {**worlds(2), "b": {"verb": "world"}}}))
    made = parse(pipeline.Config, [str(file), "--steps.w1.scale", "0.5", "--steps.b", "null"], "llama2 run")
    steps = pipeline.steps_of(made)
    assert list(steps) == ["w0", "w1"]
    assert steps["w1"].values["scale"] == 0.5


# --- a run ----------------------------------------------------------------------------------------------------------


def test_steps_start_when_what_they_need_is_done_and_cores_are_free(tmp_path, monkeypatch, capsys):
    """Two of three independent steps fit on two cores; the fourth waits for the first."""
    log = []
    start, result = launch.Workers.start.__func__, launch.Workers.result
    monkeypatch.setattr(launch.Workers, "start", classmethod(
        lambda cls, verb, values, *rest: (log.append(("start", os.path.basename(values["out"]))),
                                          start(cls, verb, values, *rest))[1]))
    monkeypatch.setattr(launch.Workers, "result", lambda self: (log.append(("end", self.log.stem)), result(self))[1])
    steps = worlds(3)
    steps["late"] = {"verb": "clean", "cores": 1, "min_characters": 0,
                     "sources": {"a": {"path": "${w0}/documents/lists.jsonl"}}}
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
    steps = {**worlds(1), "bad": {"verb": "clean", "cores": 1, "sources": {"a": {"path": "${w0}/none.jsonl"}}},
             "never": {"verb": "tokenize", "documents": "${bad}", "tokenizer": "${w0}"}}
    with pytest.raises(UserError) as error:
        pipeline.run(recipe(tmp_path, steps))
    assert error.value.cause.startswith(f"step bad: {tmp_path}/run/w0/none.jsonl: no such file or directory; ")
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
    steps = {"c": {"verb": "clean", "cores": 1, "sources": {"a": {"path": str(tmp_path / "a.txt")}}}}
    pipeline.run(recipe(tmp_path, steps))
    (tmp_path / "a.txt").write_text("Another text of some length, to be kept.")
    with pytest.raises(UserError, match=r"step c: .*a finished run made from other inputs; changed: sources.a.path"):
        pipeline.run(recipe(tmp_path, steps))


def test_two_processes_do_not_work_on_one_recipe(tmp_path):
    with runs.lock(tmp_path / "run"), pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\)"):
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
    assert capsys.readouterr().err.splitlines()[-1] == (f"{tmp_path / 'run'}: stopped after 1 of 3 steps; the same "
                                                        "command resumes")
    assert not (tmp_path / "run/w1/COMPLETE").exists()
    assert not (tmp_path / "run/w2").exists()


def test_one_step_alone(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "steps": worlds(2)}))
    assert llama2("run", file, "--step", "w1") == 0
    assert (tmp_path / "run/w1/COMPLETE").exists()
    assert not (tmp_path / "run/w0").exists()
    capsys.readouterr()
    assert llama2("run", file, "--step", "w7") == 2
    assert "the recipe has no step 'w7'; known: w0, w1" in capsys.readouterr().err


def test_the_remaining_time_is_weighed(tmp_path):
    steps = pipeline.steps_of(recipe(tmp_path, worlds(2, seconds=100)))
    board = pipeline.Board(recipe(tmp_path, worlds(2)), steps)
    assert board._eta() == "3:20"
    board.begin -= 50
    board.finished["w0"] = 50.0  # twice as fast as the recipe thought
    assert board._eta() in ("0:50", "0:49")
    assert board._picture().plain.startswith("1/2 steps  0:50 elapsed  ETA 0:")
    board = pipeline.Board(recipe(tmp_path, worlds(2)), steps)
    board.finished["w0"], board.skipped = 0.0, 100.0  # done before this command
    assert board._eta() == "1:40"
