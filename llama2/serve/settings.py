"""The configuration of a server, in a file of its own so that `--help` needs no optional library."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from llama2.config import Config as Section
from llama2.errors import UserError
from llama2.model.quantize import WeightPrecision


class Limits(Section):
    """Limits on what clients take."""

    waiting: int = Field(64, ge=0)
    """samples that may wait for a slot, of each model; beyond that clients are asked to come back
    (429)"""
    seconds: float = Field(600, gt=0)
    """the longest that a request may take"""
    body_bytes: int = Field(4 << 20, ge=1024)
    """the largest request"""
    body_seconds: float = Field(30, gt=0)
    """the longest that a request may take to arrive"""
    head_seconds: float = Field(20, gt=0)
    """the longest that a client may take to say what it wants; a connection that stays silent is
    closed"""
    idle_seconds: float = Field(60, gt=0)
    """the longest that a connection waits for another request"""
    connections: int = Field(1024, ge=1)
    """open connections; beyond that the one that has been idle the longest is closed, and if none
    is, requests are refused (503)"""
    drain_seconds: float = Field(30, ge=0)
    """after SIGTERM, the longest that running requests may take to finish"""


class Safety(Section):
    """Judging answers before they are sent."""

    model: Path | None = None
    """reward model of safety; without it nothing is judged"""
    threshold: float = Field(0.15, ge=0, le=1)
    """an answer that is safe with less probability is replaced"""
    refusal: str = "I'm sorry, but I can't help with that."
    """what replaces it"""


class ServeConfig(Section):
    """Serve checkpoints over HTTP, with OpenAI's interface and a page to chat."""

    checkpoints: tuple[Path, ...] = Field(min_length=1)
    """directories of models; the first that answers is the default, reward models serve
    /v1/score"""
    names: tuple[str, ...] = ()
    """what clients call them (default: the names of the directories)"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 is every interface of this machine"""
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free one"""
    api_keys: tuple[str, ...] = ()
    """keys that clients must send; better set LLAMA2_API_KEYS (comma-separated), which no list of
    processes shows"""
    cors: tuple[str, ...] = ()
    """origins whose pages may ask from a browser, for example http://localhost:5173; * for all,
    with API keys"""
    slots: int = Field(16, ge=1)
    """samples drawn at a time by each model"""
    capacity: int | None = Field(None, ge=2)
    """the most tokens of prompt and answer (default: the context of the model)"""
    precision: WeightPrecision = "bf16"
    """of weights; int8 and int4 (needs torchao) let decoding read less, and `llama2 quantize` says
    what they cost"""
    limits: Limits = Limits()
    safety: Safety = Safety()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Return the name of each checkpoint; UserError for names that do not fit."""
        names = self.names or tuple(path.resolve().name for path in self.checkpoints)
        if len(names) != len(self.checkpoints):
            raise UserError(
                f"{len(self.checkpoints)} checkpoints and {len(names)} names",
                "give one name for each",
            )

        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two models are called '{name}'", "name them: --names A B")

        return names
