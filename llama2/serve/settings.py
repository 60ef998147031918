"""The configuration of a server, in a file of its own: `--help` needs no optional library."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from llama2.config import Config as Section
from llama2.errors import UserError
from llama2.model.quantize import WeightPrecision


class Limits(Section):
    """Limits on what clients take."""

    waiting: int = Field(64, ge=0)
    """samples of each model that may wait for a slot; beyond that clients are asked to come back
    (429)"""
    seconds: float = Field(600, gt=0)
    """time limit of a request"""
    body_bytes: int = Field(4 << 20, ge=1024)
    """size limit of a request"""
    body_seconds: float = Field(30, gt=0)
    """time limit for a request to arrive"""
    head_seconds: float = Field(20, gt=0)
    """time limit for the head of a request; a connection that sends nothing is closed"""
    idle_seconds: float = Field(60, gt=0)
    """time that a connection waits for another request"""
    connections: int = Field(1024, ge=1)
    """open connections; beyond that the one that has been idle the longest is closed, and if none
    is, requests are refused (503)"""
    drain_seconds: float = Field(30, ge=0)
    """time limit for running requests after SIGTERM"""


class Safety(Section):
    """Judging answers before they are sent."""

    model: Path | None = None
    """directory of a reward model of safety; without it nothing is judged"""
    threshold: float = Field(0.15, ge=0, le=1)
    """least probability of being safe at which an answer is sent"""
    refusal: str = "I'm sorry, but I can't help with that."
    """text that replaces an unsafe answer"""


class ServeConfig(Section):
    """Serve checkpoints over HTTP, with OpenAI's interface and a page to chat.

    llama2 serve runs/demo/v3                      one model at http://127.0.0.1:8000

    llama2 serve runs/demo/v3 runs/demo/safe       a reward model too, at /v1/score

    LLAMA2_API_KEYS=secret llama2 serve runs/demo/v3 --host 0.0.0.0

    Endpoints: / (chat page), /v1/chat/completions, /v1/completions, /v1/score, /v1/models, /health,
    /metrics, /openapi.json (all fields). Ctrl-C lets running requests finish; a second one ends
    them.
    """

    checkpoints: tuple[Path, ...] = Field(min_length=1)
    """directories of models, or GGUF files; the first language model is the default, reward models
    serve /v1/score"""
    names: tuple[str, ...] = ()
    """names of the models for clients (default: those of the directories or files)"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 is every interface of this machine"""
    port: int = Field(8000, ge=0, le=65535)
    """port to listen at; 0 takes a free one"""
    api_keys: tuple[str, ...] = ()
    """keys of which clients must send one; better set LLAMA2_API_KEYS (comma-separated), which no
    list of processes shows"""
    cors: tuple[str, ...] = ()
    """origins whose pages may ask from a browser, for example http://localhost:5173; * for all,
    with API keys"""
    slots: int = Field(16, ge=1)
    """samples that each model draws at a time"""
    capacity: int | None = Field(None, ge=2)
    """most tokens of prompt and answer together (default: the context of the model)"""
    precision: WeightPrecision = "bf16"
    """precision of the weights; int8 and int4 (needs torchao) make decoding read less, and
    `llama2 quantize` measures what they cost"""
    limits: Limits = Limits()
    safety: Safety = Safety()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Return the name of each checkpoint; UserError for names that do not fit."""
        names = self.names or tuple(map(_name_model, self.checkpoints))
        if len(names) != len(self.checkpoints):
            raise UserError(
                f"{len(self.checkpoints)} checkpoints and {len(names)} names",
                "give one name for each",
            )

        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two models are called '{name}'", "name them: --names A B")

        return names


def _name_model(path: Path) -> str:
    """Return the name of a directory, or of a file without its ending."""
    place = path.resolve()
    return place.stem if place.is_file() else place.name
