"""Configuration: recipes and flags in, frozen models out, checked once and before any work."""

from llama2.config.models import (
    Config,
    StageConfig,
    build,
    check_names,
    derive_seed,
    list_incidentals,
    list_paths,
)
from llama2.config.parse import parse

__all__ = [
    "Config",
    "StageConfig",
    "build",
    "check_names",
    "derive_seed",
    "list_incidentals",
    "list_paths",
    "parse",
]
