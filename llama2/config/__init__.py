"""Configuration: recipes and flags in, frozen models out, checked once and before any work."""

from llama2.config.models import (
    Config,
    StageConfig,
    build,
    check_names,
    derive,
    incidentals,
    parse,
    paths,
)

__all__ = [
    "Config",
    "StageConfig",
    "build",
    "check_names",
    "derive",
    "incidentals",
    "parse",
    "paths",
]
