"""One command line: parsed, its inputs looked at, and carried out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from llama2 import ranks
from llama2.config import parse
from llama2.errors import UserError
from llama2.recipe import inputs, verbs
from llama2.recipe.workers import execute
from llama2.runs import Stopped


def load(verb: str) -> ModuleType:
    """Import the module behind a verb, that of a whole recipe included."""
    if verb != "run":
        return verbs.load(verb)

    # a recipe knows how stages train and sample, which no other command needs to load
    from llama2.recipe import pipeline

    return pipeline


def run_command(verb: str, arguments: Sequence[str]) -> int:
    """Parse and carry out one command line; return its exit status."""
    if verb == "run":
        _refuse_without_recipe(arguments)

    module = load(verb)
    if any(word.partition("=")[0] == "--dry-run" for word in arguments):
        # planning knows how stages train and sample, which no other command needs to load
        from llama2.recipe import dry_run

        return dry_run.show(verb, module, list(arguments))

    config = parse(module.Config, verbs.name_positional(module, list(arguments)), f"llama2 {verb}")
    makes_run = verbs.VERBS[verb].makes_run
    inspects_run = verb == "verify" and len(config.checkpoints) == 1
    if verb != "run" and not inspects_run:
        inputs.check(config, complete=makes_run)

    # a stage compares its inputs when its run opens
    if not makes_run and verb != "verify":
        inputs.check_whole(config)

    try:
        if not makes_run:
            return int(module.run(config) or 0)  # a comparison has a result that scripts ask for

        if execute(verb, config).is_main:
            print(config.out)
    except Stopped as stopped:
        print(f"llama2: {stopped}", file=sys.stderr)
        return stopped.exit_code
    finally:
        ranks.leave()

    return 0


def _refuse_without_recipe(arguments: Sequence[str]) -> None:
    """UserError where neither a file nor a flag gives the steps, and no help is asked for."""
    words = [word for word in arguments if word not in ("--dry-run", "--json")]
    if words and not words[0].startswith("-"):
        return

    if not any(word in ("-h", "--help") or word.startswith("--steps.") for word in words):
        raise UserError("a recipe is needed", "name one: llama2 run recipes/demo/recipe.yaml")
