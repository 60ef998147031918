"""The table of verbs: their summaries, and the modules behind them.

A stage is a module with a `Config` (what to do) and `run(config, run)` (do it into an open run
directory). Every other verb has a `Config` and `run(config)`, which may return an exit status.
Either may have `plan(config, cluster, planned)` (what it would cost) and `POSITIONAL` (the field
that a first argument which is no recipe fills).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from llama2.interrupts import leave_at_once


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    section: str
    """of the paper"""
    summary: str
    makes_run: bool = True
    """whether it leaves a run directory, as every step of a recipe does"""


VERBS = {
    "run": Verb("§3.2", "a whole recipe: an ordered list of runs, resumable at any point", False),
    "world": Verb("", "the synthetic world of the demo: documents, demonstrations, prompts"),
    "prepare": Verb("", "public instruction and preference data into our records"),
    "import": Verb("", "a checkpoint of Hugging Face, PEFT, Meta, GGUF, llama2.c", False),
    "clean": Verb("§2.1", "documents: clean, mask personal data, deduplicate, hold out"),
    "tokenizer": Verb("§2.2", "train a SentencePiece BPE tokenizer"),
    "tokenize": Verb("§2.1", "mix sources and write memory-mapped token shards"),
    "pretrain": Verb("§2.2", "next-token training from scratch or from a checkpoint"),
    "sft": Verb("§3.1", "supervised fine-tuning on dialogs, loss on answers only"),
    "collect": Verb("§3.2.1", "two answers a prompt, compared by annotators"),
    "reward": Verb(
        "§3.2.2", "a reward model from comparisons: ranking with margin, safety auxiliary"
    ),
    "accuracy": Verb("§3.2.2", "a finished reward model on comparisons that were kept apart"),
    "rejection": Verb("§3.2.3", "best of K samples under the reward models"),
    "ppo": Verb("§3.2.3", "proximal policy optimisation against the reward models"),
    "ghost": Verb("§3.3", "Ghost Attention: dialogs that keep an instruction"),
    "distill": Verb("§4.2.4", "safety context distillation"),
    "select": Verb("§3.4.1", "keep a version only if it beats its predecessor"),
    "evaluate": Verb("§3.4", "every version, on both axes"),
    "report": Verb("", "one self-contained HTML page about a recipe's runs"),
    "quantize": Verb("", "what weights of fewer bits cost, on held-out text", False),
    "export": Verb("", "write a checkpoint for other programs, and verify what was written", False),
    "verify": Verb("", "whether two checkpoints are the same model, or a run is undamaged", False),
    "release": Verb("", "a model with its card, carbon, licences, and how it was made", False),
    "carbon": Verb("§2.2.1", "energy and carbon of device-hours, by the method of Table 2", False),
    "chat": Verb("", "talk to a checkpoint in the terminal", False),
    "serve": Verb(
        "", "serve checkpoints over HTTP, with OpenAI's interface and a chat page", False
    ),
}


def name_positional(module: ModuleType, arguments: list[str]) -> list[str]:
    """Put the flag before a first argument that stands for one: `llama2 chat DIRECTORY`."""
    name = getattr(module, "POSITIONAL", "")
    first = arguments[0] if arguments else "-"
    if not name or first.startswith("-") or first.endswith((".yaml", ".yml")):
        return arguments

    return [f"--{name}", *arguments]


@leave_at_once()
def load(verb: str) -> ModuleType:
    """Import the module behind a verb; KeyError for an unknown one, and for `run`, whose module
    lies above this one. The imports are written out, so that the contract of layers sees them."""
    module: ModuleType
    match verb:
        case "world":
            from llama2.stages import world as module
        case "prepare":
            from llama2.stages import prepare as module
        case "import":
            from llama2.convert import import_ as module
        case "clean":
            from llama2.stages import clean as module
        case "tokenizer":
            from llama2.stages import tokenizer as module
        case "tokenize":
            from llama2.stages import tokenize as module
        case "pretrain":
            from llama2.stages import pretrain as module
        case "sft":
            from llama2.stages import sft as module
        case "collect":
            from llama2.stages import collect as module
        case "reward":
            from llama2.stages import reward as module
        case "accuracy":
            from llama2.stages import accuracy as module
        case "rejection":
            from llama2.stages import rejection as module
        case "ppo":
            from llama2.stages import ppo as module
        case "ghost":
            from llama2.stages import ghost as module
        case "distill":
            from llama2.stages import distill as module
        case "select":
            from llama2.stages import select as module
        case "evaluate":
            from llama2.stages import evaluate as module
        case "report":
            from llama2.report import report as module
        case "quantize":
            from llama2.evaluate import quantization as module
        case "export":
            from llama2.convert import export as module
        case "verify":
            from llama2.convert import verify as module
        case "release":
            from llama2.release import bundle as module
        case "carbon":
            from llama2.release import carbon as module
        case "chat":
            from llama2.chat import terminal as module
        case "serve":
            from llama2.serve import server as module
        case _:
            raise KeyError(verb)

    return module
