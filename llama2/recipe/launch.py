"""The table of verbs, and how one is carried out: here, or in processes of its own.

A stage is a module with a `Config` (what to do), `run(config, run)` (do it into an open run
directory) and, where it makes sense, `plan(config, cluster, lineage)` (what it would cost). This
module turns a verb and a configuration into a finished run; `Workers` does the same in fresh
processes, which is how a recipe runs stages side by side and data-parallel.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llama2 import ranks, rendezvous, runs
from llama2.config import StageConfig, build, parse
from llama2.errors import UserError, explain_os_errors
from llama2.interrupts import held_back, leave_at_once
from llama2.recipe import inputs
from llama2.runs import Stopped


@dataclass(frozen=True)
class Verb:
    """Where a verb lives and what it does."""

    module: str
    summary: str
    makes_run: bool = True


VERBS = {
    "run": Verb(
        "recipe.pipeline",
        "§3.2  a whole recipe: an ordered list of runs, resumable at any point",
        False,
    ),
    "world": Verb(
        "stages.world", "      the synthetic world of the demo: documents, demonstrations, prompts"
    ),
    "prepare": Verb(
        "stages.prepare", "      public instruction and preference data into our records"
    ),
    "import": Verb(
        "convert.import_", "      a checkpoint of Hugging Face, PEFT, Meta, GGUF, llama2.c", False
    ),
    "clean": Verb(
        "stages.clean", "§2.1  documents: clean, mask personal data, deduplicate, hold out"
    ),
    "tokenizer": Verb("stages.tokenizer", "§2.2  train a SentencePiece BPE tokenizer"),
    "tokenize": Verb("stages.tokenize", "§2.1  mix sources and write memory-mapped token shards"),
    "pretrain": Verb(
        "stages.pretrain", "§2.2  next-token training from scratch or from a checkpoint"
    ),
    "sft": Verb("stages.sft", "§3.1  supervised fine-tuning on dialogs, loss on answers only"),
    "collect": Verb("stages.collect", "§3.2.1 two answers a prompt, compared by annotators"),
    "reward": Verb(
        "stages.reward",
        "§3.2.2 a reward model from comparisons: ranking with margin, safety auxiliary",
    ),
    "rejection": Verb("stages.rejection", "§3.2.3 best of K samples under the reward models"),
    "ppo": Verb("stages.ppo", "§3.2.3 proximal policy optimisation against the reward models"),
    "ghost": Verb("stages.ghost", "§3.3  Ghost Attention: dialogs that keep an instruction"),
    "distill": Verb("stages.distill", "§4.2.4 safety context distillation"),
    "select": Verb("stages.select", "§3.4.1 keep a version only if it beats its predecessor"),
    "evaluate": Verb("stages.evaluate", "§3.4  every version, on both axes"),
    "report": Verb("report.report", "      one self-contained HTML page about a recipe's runs"),
    "quantize": Verb(
        "evaluate.quantization", "      what weights of fewer bits cost, on held-out text", False
    ),
    "export": Verb(
        "convert.export",
        "      write a checkpoint for other programs, and verify what was written",
        False,
    ),
    "verify": Verb(
        "convert.verify",
        "      whether two checkpoints are the same model, or a run is undamaged",
        False,
    ),
    "release": Verb(
        "release.bundle",
        "      a model with its card, carbon, licences, and how it was made",
        False,
    ),
    "carbon": Verb(
        "report.carbon", "§2.2.1 energy and carbon of device-hours, by the method of Table 2", False
    ),
    "chat": Verb("chat.terminal", "      talk to a checkpoint in the terminal", False),
    "serve": Verb(
        "serve.server",
        "      serve checkpoints over HTTP, with OpenAI's interface and a chat page",
        False,
    ),
}


def stage(verb: str) -> Any:
    """The module behind a verb."""
    with leave_at_once():
        return importlib.import_module(f"llama2.{VERBS[verb].module}")


def command(verb: str, arguments: Sequence[str]) -> int:
    """Parse and carry out one command line; the exit status."""
    module = stage(verb)
    if verb == "run":
        _refuse_without_recipe(arguments)

    if any(word.partition("=")[0] == "--dry-run" for word in arguments):
        dry = importlib.import_module("llama2.recipe.dry_run")
        return int(dry.show(verb, module, list(arguments), _positional))

    config = parse(module.Config, _positional(module, list(arguments)), f"llama2 {verb}")
    # a run is looked at, not a model
    if verb != "run" and not (verb == "verify" and len(config.checkpoints) == 1):
        inputs.check(config, complete=VERBS[verb].makes_run)

    # a stage compares its inputs when its run opens
    if not VERBS[verb].makes_run and verb != "verify":
        inputs.check_whole(config)

    try:
        if VERBS[verb].makes_run:
            if execute(verb, config).is_main:
                print(config.out)
        else:
            return int(module.run(config) or 0)  # a comparison has a result that scripts ask for
    except Stopped as stopped:
        print(f"llama2: {stopped}", file=sys.stderr)
        return stopped.exit_code
    finally:
        ranks.leave()

    return 0


def _refuse_without_recipe(arguments: Sequence[str]) -> None:
    """UserError where neither a file nor a flag says what the steps are, and no help is asked
    for."""
    words = [word for word in arguments if word not in ("--dry-run", "--json")]
    named = bool(words) and not words[0].startswith("-")
    if not named and not any(
        word in ("-h", "--help") or word.startswith("--steps.") for word in arguments
    ):
        raise UserError("a recipe is needed", "name one: llama2 run recipes/demo/recipe.yaml")


def _positional(module: Any, flags: list[str]) -> list[str]:
    """`llama2 chat DIRECTORY`: a first argument that is no recipe fills the field the stage names
    as positional."""
    name = getattr(module, "POSITIONAL", None)
    if name and flags and not flags[0].startswith("-") and not flags[0].endswith((".yaml", ".yml")):
        return [f"--{name.replace('_', '-')}", *flags]

    return flags


def execute(verb: str, config: StageConfig) -> ranks.Ranks:
    """Carry out one stage in this process (and its torchrun ranks), unless it is finished; return
    these ranks."""
    joined = ranks.join()
    with joined.explain_disconnects(), runs.open_run(verb, config, joined) as run:
        if not run.finished:
            stage(verb).run(config, run)

    return joined


# --- in processes of their own
# -------------------------------------------------------------------------------------

# what multiprocessing says of a process whose parent, the server of workers, has ended
SERVER_GONE = 255
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Import the heavy modules once, in the server every worker is forked from. It hears of no
    signal to stop."""
    _context.set_forkserver_preload(
        [
            "torch",
            "llama2.recipe.launch",
            "torch.distributed",
            *(f"llama2.{verb.module}" for verb in VERBS.values()),
        ]
    )
    resource_tracker.ensure_running()  # first: to start it lets Ctrl-C through
    with held_back():
        forkserver.ensure_running()


@dataclass
class Workers:
    """The processes of one stage: `ranks` of them, `threads` each, writing to one log file."""

    processes: list[Any]
    lifelines: list[Connection]
    messages: Connection
    log: Path
    asked: bool = field(default=False, init=False)
    """whether they were asked to stop"""
    failed: int = field(default=0, init=False)
    """the exit status of the first that failed, negative if a signal ended it"""

    @property
    def killed(self) -> bool:
        """Whether the system, not the work, ended a process: there is nothing to mend."""
        return not self.asked and (self.failed < 0 or self.failed == SERVER_GONE)

    @classmethod
    def start(
        cls, verb: str, config: Mapping[str, Any], ranks: int, threads: int, log: Path
    ) -> Workers:
        """Fork the ranks of one stage."""
        log.parent.mkdir(parents=True, exist_ok=True)
        receive, send = _context.Pipe(duplex=False)
        port = _free_port()
        processes, lifelines = [], []

        for rank in range(ranks):
            theirs, ours = _context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = _context.Process(
                target=_worker,
                args=(verb, dict(config), environment, threads, str(log), theirs, send),
            )
            process.start()
            theirs.close()
            processes.append(process)
            lifelines.append(ours)

        send.close()
        return cls(processes, lifelines, receive, log)

    def alive(self) -> bool:
        """Whether any rank still runs; one that failed takes the others down (they would wait for
        it forever)."""
        self.failed = self.failed or next(
            (process.exitcode for process in self.processes if process.exitcode), 0
        )
        if self.failed:
            for process in self.processes:
                process.kill()

            for lifeline in self.lifelines:  # without the server of workers no signal reaches them
                lifeline.close()

        return any(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """Ask for a checkpoint and a clean exit; a stage without checkpoints ends at once and
        starts over next time."""
        self.asked = True
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End them at once."""
        self.asked = True
        for process in self.processes:
            process.kill()

    def result(self) -> str:
        """'done', 'stopped' or an error's text, once no rank is alive."""
        for process in self.processes:
            process.join()

        said = []
        try:
            while self.messages.poll():
                said.append(self.messages.recv())
        except EOFError:
            pass

        self.failed = self.failed or next(
            (process.exitcode for process in self.processes if process.exitcode), 0
        )
        errors = [text for text in said if text not in ("done", "stopped")]
        # others only miss who failed
        own = [text for text in errors if not text.endswith(rendezvous.RESUMES)]

        if own:
            return str(own[0])
        if self.asked and any(
            process.exitcode in (-signal.SIGTERM, -signal.SIGKILL) for process in self.processes
        ):
            return "stopped"

        if self.killed:
            how = f"signal {-self.failed}" if self.failed < 0 else "with the one that starts them"
            memory = "; out of memory?" if self.failed in (-signal.SIGKILL, SERVER_GONE) else ""
            return f"a worker process was killed ({how}{memory}); its log: {self.log}"

        if errors:
            return str(errors[0])
        if self.failed:
            return f"a process ended with exit status {self.failed}; its log: {self.log}"

        return "stopped" if "stopped" in said else "done"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(
    verb: str,
    values: dict[str, Any],
    environment: dict[str, str],
    threads: int,
    log: str,
    lifeline: Connection,
    messages: Connection,
) -> None:
    """One rank of one stage: its output goes to the log, its outcome to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it sends SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)

    try:
        with explain_os_errors(values.get("out", "output")):
            execute(verb, build(stage(verb).Config, values))

        messages.send("done")
    except Stopped:
        messages.send("stopped")
    except UserError as error:
        messages.send(str(error))
        raise SystemExit(error.exit_code) from None

    ranks.exit_now()


def _die_with_parent(lifeline: Connection) -> None:
    """Block until the parent is gone (its end of the pipe closes), then end at once: no orphan
    holds a run."""
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)
