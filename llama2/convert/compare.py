"""Two checkpoints held against each other: their shapes, their tensors, and what they make of a
sequence.

No model is ever whole in memory: tensors are compared in pairs, and the sequence goes through both
models layer by layer, with one layer loaded at a time, which also tells the first layer where they
part.

Shapes: T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.formats import gguf, gguf_metadata
from llama2.formats.binary import round_to_single
from llama2.formats.hf_directory import SCORE
from llama2.formats.stored_model import StoredModel
from llama2.model.llama import Layer, LlamaConfig, RMSNorm, Trunk
from llama2.model.tensors import EMBEDDINGS, HEAD

NORM = "model.norm.weight"
_CHUNK = 1 << 20  # numbers that are compared at a time
_POSITIONS = 512  # whose logits are held at once
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_CONSTANTS = ("rms_norm_eps", "rope_theta")
_LABELS = ("max_position_embeddings", "bos_token_id", "eos_token_id")
_UNSAID: Mapping[str, tuple[str, ...]] = {
    "meta": _LABELS,
    "llama2c": ("bos_token_id", "eos_token_id"),
}
"""what a format does not hold: its reader gives Llama 2's value"""
_SINGLE = {"gguf", "llama2c"}
"""formats whose constants are numbers of fp32, in which all models compute"""


@dataclass(frozen=True)
class Shapes:
    """Where two configurations differ. Models of other `sizes` cannot be compared any further."""

    sizes: tuple[str, ...]
    constants: tuple[str, ...]
    notes: tuple[str, ...]
    """differences in what one of the formats does not hold"""


@dataclass(frozen=True)
class Tensors:
    """How far the tensors of two checkpoints are apart."""

    count: int
    equal: int
    """those that are equal in value, bit for bit but for the sign of zero"""
    largest: float
    """the largest difference of two numbers"""
    name: str | None
    """the tensor where that is; None if there is none"""
    relative: float
    """the largest difference beside the largest number of its tensor"""
    relative_name: str | None
    spread: float
    """root mean square of all differences beside that of all numbers"""


@dataclass(frozen=True)
class Outputs:
    """How far logits (or a reward model's scores) are apart on one sequence."""

    kind: str
    positions: int
    largest: float
    mean: float
    position: int
    """where the largest difference is"""
    token: int
    """the item of the vocabulary whose logit that is; of scores, the item read there"""
    agreeing: float
    """how often the likeliest next token is the same one; of scores, their sign"""
    first_position: int | None
    """the first position at which the difference exceeds the tolerance"""
    first_token: int | None
    first_layer: str | None
    """the first part of the model whose output exceeds it"""


def shapes(a: StoredModel, b: StoredModel) -> Shapes:
    """Compare two configurations, and whether both are language models."""
    single = bool({a.format, b.format} & _SINGLE)

    def differing(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for name in names:
            one, other = getattr(a.config, name), getattr(b.config, name)
            if one != other and not (
                single and name in _CONSTANTS and round_to_single(one) == round_to_single(other)
            ):
                yield name, f"{name}: {one} and {other}"

    sizes = [text for _, text in differing(_SIZES)]
    if a.scorer != b.scorer:
        sizes.insert(
            0,
            " and ".join(
                "a reward model" if side.scorer else "a language model" for side in (a, b)
            ),
        )

    unsaid = {*_UNSAID.get(a.format, ()), *_UNSAID.get(b.format, ())}
    if (
        gguf.FORMAT in (a.format, b.format)
        and a.config.stops[: len(gguf_metadata.ENDS)] == b.config.stops[: len(gguf_metadata.ENDS)]
    ):
        unsaid.add("eos_token_id")  # it has places for so many

    labels = list(differing(_LABELS))
    return Shapes(
        tuple(sizes),
        tuple(
            [text for _, text in differing(_CONSTANTS)]
            + [text for name, text in labels if name not in unsaid]
        ),
        tuple(
            f"{text}, which one of the formats does not hold"
            for name, text in labels
            if name in unsaid
        ),
    )


# ---- tensors
# --------------------------------------------------------------------------------------------------------
def tensors(a: StoredModel, b: StoredModel) -> Tensors:
    """Compare two checkpoints of one shape tensor by tensor; two are in memory at a time.

    A head that one of them shares with the embeddings is compared with the other's own.
    """
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    equal, largest, place, relative, relative_place, squares, total = (
        0,
        0.0,
        None,
        0.0,
        None,
        0.0,
        0.0,
    )
    for name in names:
        gap = _gap(tensor(a, name), tensor(b, name))
        equal += gap.largest == 0
        squares, total = squares + gap.squares, total + gap.total

        if gap.largest > largest:
            largest, place = gap.largest, name

        if gap.largest > relative * gap.peak:
            relative, relative_place = gap.largest / gap.peak if gap.peak else math.inf, name

    return Tensors(
        len(names),
        equal,
        largest,
        place,
        relative,
        relative_place,
        math.sqrt(squares / total) if total else 0.0,
    )


def tensor(source: StoredModel, name: str) -> Tensor:
    """A tensor of a checkpoint, whose head may be its embeddings."""
    shared = name == HEAD and name not in source.tensors
    return source.tensors[EMBEDDINGS if shared else name].read()


@dataclass(frozen=True)
class _Gap:
    largest: float
    peak: float
    """the largest number of the first"""
    squares: float
    total: float


def _gap(x: Tensor, y: Tensor) -> _Gap:
    largest = peak = squares = total = 0.0
    kind = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    for one, other in zip(torch.split(x.reshape(-1), _CHUNK), torch.split(y.reshape(-1), _CHUNK)):
        one, other = one.to(kind), other.to(kind)
        total += one.square().sum().item()
        if torch.equal(one, other):
            continue

        apart = difference(one, other)
        largest, squares = max(largest, apart.max().item()), squares + apart.square().sum().item()

    if largest:
        peak = max(part.abs().max().item() for part in torch.split(x.reshape(-1), _CHUNK))

    return _Gap(largest, peak, squares, total)


def difference(x: Tensor, y: Tensor) -> Tensor:
    """How far numbers are apart: infinitely if one of them is not a number and the other is."""
    same = (x == y) | (x.isnan() & y.isnan())
    return (x - y).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0)


# ---- what they compute
# ----------------------------------------------------------------------------------------------
@torch.no_grad()
def outputs(
    a: StoredModel,
    b: StoredModel,
    length: int,
    tolerance: float,
    device: torch.device,
    seed: int = 0,
) -> Outputs:
    """Send one random sequence of `length` tokens through both models, in fp32, and compare what
    comes out.

    Logits of language models at every position; of reward models the score after each token.
    """
    tokens_1T = torch.randint(
        a.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed)
    )
    tokens_1T[0, 0] = a.config.bos_token_id
    tokens_1T = tokens_1T.to(device)
    first_layer = None
    walks = [_walk(side, tokens_1T) for side in (a, b)]
    hidden: list[Tensor] = []

    for (name, one), (_, other) in zip(*walks):
        hidden = [one, other]
        if first_layer is None and difference(one, other).max().item() > tolerance:
            first_layer = name

    found = _Heads(a, b, device).compare(hidden[0][0], hidden[1][0], tokens_1T[0], tolerance)
    if first_layer is None and found.first_position is not None:
        first_layer = SCORE if a.scorer else HEAD

    return Outputs(**{**found.__dict__, "first_layer": first_layer})


def _walk(source: StoredModel, tokens_1T: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stream after each part of a model, by name, the normed hidden states last; one part
    loaded at a time."""
    config = source.config
    x_1TD: Tensor = F.embedding(
        tokens_1T, source.tensors[EMBEDDINGS].read().to(tokens_1T.device, torch.float32)
    )
    yield EMBEDDINGS.removesuffix(".weight"), x_1TD

    with torch.device("meta"):
        trunk = Trunk(config)

    context = trunk.context(x_1TD, None, None, None)
    update_1TD: Tensor | None = None
    for index in range(config.num_hidden_layers):
        x_1TD, update_1TD = _layer(source, index, x_1TD)(x_1TD, update_1TD, context)
        yield f"model.layers.{index}", x_1TD + update_1TD

    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(source.tensors[NORM].read().float())
    yield NORM.removesuffix(".weight"), norm.to(x_1TD.device)(x_1TD, update_1TD)[1]


def _layer(source: StoredModel, index: int, like: Tensor) -> Layer:
    with torch.device("meta"):
        layer = Layer(source.config, index)

    layer.load_state_dict(
        {
            name: source.tensors[f"model.layers.{index}.{name}"]
            .read()
            .to(like.device, torch.float32)
            for name in layer.state_dict()
        },
        assign=True,
    )
    return layer


class _Heads:
    """The output matrices of two models, and the comparison of what they give."""

    def __init__(self, a: StoredModel, b: StoredModel, device: torch.device) -> None:
        self.kind = "scores" if a.scorer else "logits"
        self.weights = [
            tensor(side, SCORE if side.scorer else HEAD).to(device, torch.float32)
            for side in (a, b)
        ]

    def compare(
        self, one_TD: Tensor, other_TD: Tensor, tokens_T: Tensor, tolerance: float
    ) -> Outputs:
        largest, position, token, first, first_token = -1.0, 0, 0, None, None
        total, agreeing = 0.0, 0
        for begin in range(0, len(tokens_T), _POSITIONS):
            chosen = slice(begin, begin + _POSITIONS)
            x_PV, y_PV = (
                F.linear(hidden[chosen], weight)
                for hidden, weight in zip((one_TD, other_TD), self.weights)
            )
            apart_PV = difference(x_PV, y_PV)
            highest_P, items_P = apart_PV.max(-1)

            if self.kind == "scores":
                items_P = tokens_T[chosen]
                agreeing += int((x_PV.sign() == y_PV.sign()).sum())
            else:
                agreeing += int((x_PV.argmax(-1) == y_PV.argmax(-1)).sum())

            total += apart_PV.mean(-1).sum().item()
            best = int(highest_P.argmax())
            if highest_P[best].item() > largest:
                largest, position, token = highest_P[best].item(), begin + best, int(items_P[best])

            beyond = (highest_P > tolerance).nonzero()
            if first is None and len(beyond):
                first, first_token = begin + int(beyond[0]), int(items_P[beyond[0]])

        count = len(tokens_T)
        return Outputs(
            self.kind,
            count,
            largest,
            total / count,
            position,
            token,
            agreeing / count,
            first,
            first_token,
            None,
        )


def context(a: LlamaConfig, b: LlamaConfig) -> int:
    """The longest sequence that both models take."""
    return min(a.max_position_embeddings, b.max_position_embeddings)
