"""`--dry-run`: the resolved configuration of a command and what it would cost. Apart from
`launch.py`, because planning knows how stages train and sample, which a command that is carried out
need not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llama2.config import build, parse, yaml12
from llama2.config.flags import overrides
from llama2.errors import UserError
from llama2.ranks import requested
from llama2.stages.common.planning import Cluster, Lineage


def show(
    verb: str, module: Any, arguments: list[str], positional: Callable[[Any, list[str]], list[str]]
) -> int:
    """Print it, with `--json` for programs; the exit status. `positional` names a stage's first
    argument."""
    cluster, flags = _cluster(_without(arguments, ("--dry-run", "--json")))
    config = parse(module.Config, positional(module, flags), f"llama2 {verb}")
    shown = {"config": config.model_dump(mode="json")}

    if hasattr(module, "plan"):
        shown |= {"cluster": cluster.model_dump()} | module.plan(config, cluster, Lineage())

    as_yaml = yaml12.dump(shown, default_flow_style=None, width=120)
    print(json.dumps(shown, indent=1) if "--json" in arguments else as_yaml, end="")
    return 0


def _without(arguments: list[str], switches: tuple[str, ...]) -> list[str]:
    """The arguments but for `switches`, which take no value: a word behind one may be a recipe
    before all flags."""
    rest: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        switch, _, value = word.partition("=")
        if switch not in switches:
            rest.append(word)
        elif value or (rest and not following.startswith("--")):
            raise UserError(f"{switch} takes no value (it is {value or following})", "leave it out")

    return rest


def _cluster(flags: list[str]) -> tuple[Cluster, list[str]]:
    """`--ranks`, `--gib`, `--tflops`, `--mfu` describe the machines of a dry run; all other flags
    are the stage's."""
    mine: list[str] = []
    rest: list[str] = []
    names = {f"--{name}" for name in Cluster.model_fields}
    into = rest

    for word in flags:
        if word.startswith("--"):
            into = mine if word.partition("=")[0] in names else rest

        into.append(word)

    ranks = requested()
    values = {"ranks": ranks} if ranks else {}
    return build(Cluster, values | overrides(Cluster, mine, values), "--dry-run"), rest
