"""`--dry-run`: the resolved configuration of a command and what it would cost."""

from __future__ import annotations

import json
from types import ModuleType

from llama2.config import build, parse, yaml12
from llama2.config.flags import read_flags
from llama2.errors import UserError
from llama2.ranks import count_requested
from llama2.recipe.verbs import name_positional
from llama2.stages.common.planning import Cluster, PlannedRuns


def show(verb: str, module: ModuleType, arguments: list[str]) -> int:
    """Print it, with `--json` for programs; return the exit status."""
    cluster, flags = _read_cluster(_drop_switches(arguments))
    config = parse(module.Config, name_positional(module, flags), f"llama2 {verb}")
    shown = {"config": config.model_dump(mode="json")}
    if hasattr(module, "plan"):
        shown |= {"cluster": cluster.model_dump()} | module.plan(config, cluster, PlannedRuns())

    as_yaml = yaml12.dump(shown, default_flow_style=None, width=120)
    print(json.dumps(shown, indent=1) if "--json" in arguments else as_yaml, end="")
    return 0


def _drop_switches(arguments: list[str]) -> list[str]:
    """Return the arguments but for the two that take no value: a word behind one may be a recipe
    before all flags."""
    rest: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        switch, _, value = word.partition("=")
        if switch not in ("--dry-run", "--json"):
            rest.append(word)
        elif value or (rest and not following.startswith("--")):
            raise UserError(f"{switch} takes no value (it is {value or following})", "leave it out")

    return rest


def _read_cluster(arguments: list[str]) -> tuple[Cluster, list[str]]:
    """Return the machines of a dry run (`--ranks`, `--gib`, `--tflops`, `--mfu`), and the flags
    that are the stage's."""
    of_cluster: list[str] = []
    rest: list[str] = []
    current = rest
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            current = of_cluster if name in Cluster.model_fields else rest

        current.append(word)

    ranks = count_requested()
    values = {"ranks": ranks} if ranks else {}
    flags = read_flags(Cluster, of_cluster, values)
    return build(Cluster, values | flags, "--dry-run"), rest
