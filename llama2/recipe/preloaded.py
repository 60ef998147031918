"""Everything a worker needs, imported: the server of workers loads this module before it forks."""

from llama2.recipe import verbs, workers

__all__ = ["workers"]

for verb in verbs.VERBS.keys() - {"run"}:
    verbs.load(verb)
