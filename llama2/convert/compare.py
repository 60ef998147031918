"""Compare two checkpoints: their shapes, their tensors, and their outputs on a sequence.

No model is ever whole in memory: tensors are compared in pairs, and the sequence goes through both
models layer by layer, with one layer loaded at a time, which also finds the first layer where they
differ.

Shapes: T positions, P positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2 import kernels
from llama2.formats import gguf, llama2c, meta
from llama2.formats.binary import round_to_single
from llama2.formats.gguf_metadata import ENDS
from llama2.formats.hf_directory import SCORE
from llama2.formats.stored_model import StoredModel
from llama2.model.llama import Layer, LlamaConfig, RMSNorm, Trunk
from llama2.model.rope import RopeScaling
from llama2.model.tensors import EMBEDDINGS, HEAD, NORM

_CHUNK = 1 << 20  # numbers that are compared at a time
_POSITIONS = 512  # whose logits are in memory at once
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "attention_output_bias",
)
_CONSTANTS = ("rms_norm_eps", "rope_theta")
_LABELS = ("max_position_embeddings", "bos_token_id", "eos_token_id")
# a format has no place for these: its reader gives Llama 2's value
_LOST: Mapping[str, tuple[str, ...]] = {
    meta.FORMAT: _LABELS,
    llama2c.FORMAT: ("bos_token_id", "eos_token_id"),
}
# formats whose constants are numbers of fp32, in which all models compute
_SINGLE = {gguf.FORMAT, llama2c.FORMAT}


@dataclass(frozen=True)
class Shapes:
    """Differences of two configurations, in words.

    Models of other `sizes` cannot be compared any further. `notes` are differences in settings that
    one of the formats has no place for.
    """

    sizes: tuple[str, ...]
    constants: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Tensors:
    """Distances of the tensors of two checkpoints.

    `equal` counts those that are equal in value, bit for bit but for the sign of zero. `largest` is
    the largest difference of two numbers, in the tensor `name` (None: there is none); `relative`
    the largest difference divided by the largest number of its tensor; `spread` the root mean
    square of all differences divided by that of all numbers.
    """

    count: int
    equal: int
    largest: float
    name: str | None
    relative: float
    relative_name: str | None
    spread: float


@dataclass(frozen=True)
class Outputs:
    """Distances of logits (or of a reward model's scores) on one sequence.

    The largest difference is at `position`, for the item `token` of the vocabulary (of scores, the
    token read there). `agreeing` is the share of positions with the same likeliest next token (of
    scores, with the same sign). `first_position`, `first_token` and `first_layer` are the first at
    which the difference exceeds the tolerance.
    """

    kind: str
    positions: int
    largest: float
    mean: float
    position: int
    token: int
    agreeing: float
    first_position: int | None
    first_token: int | None
    first_layer: str | None


# --- shapes ---
def compare_shapes(a: StoredModel, b: StoredModel) -> Shapes:
    """Compare two configurations, and whether both are language models."""
    formats = {a.format, b.format}
    lost = {name for form in formats for name in _LOST.get(form, ())}
    places = len(ENDS)
    if gguf.FORMAT in formats and a.config.stops[:places] == b.config.stops[:places]:
        lost.add("eos_token_id")  # GGUF has so many places
    if gguf.FORMAT in formats and None in (a.config.bos_token_id, b.config.bos_token_id):
        lost.add("bos_token_id")  # whose absence means 1 there

    differences: dict[str, str] = {}
    if not _is_same_scaling(a.config.rope_scaling, b.config.rope_scaling):
        differences["rope_scaling"] = (
            f"rope_scaling: {a.config.rope_scaling} and {b.config.rope_scaling}"
        )

    for name in (*_SIZES, *_CONSTANTS, *_LABELS):
        x, y = getattr(a.config, name), getattr(b.config, name)
        if name in _CONSTANTS and formats & _SINGLE:
            equal = round_to_single(x) == round_to_single(y)
        else:
            equal = x == y

        if not equal:
            differences[name] = f"{name}: {x} and {y}"

    sizes = [differences.pop(name) for name in _SIZES if name in differences]
    notes = [differences.pop(name) for name in _LABELS if name in differences and name in lost]
    if a.scorer != b.scorer:
        kinds = ["a reward model" if model.scorer else "a language model" for model in (a, b)]
        sizes.insert(0, " and ".join(kinds))

    return Shapes(
        tuple(sizes),
        tuple(differences.values()),
        tuple(f"{note}, which one of the formats does not hold" for note in notes),
    )


def _is_same_scaling(a: RopeScaling | None, b: RopeScaling | None) -> bool:
    """Compare two scalings of positions, whose numbers a format may hold in fp32."""
    if a is None or b is None or a.rope_type != b.rope_type:
        return a == b

    pairs = zip(astuple(a)[1:], astuple(b)[1:])
    return all(math.isclose(x or 0, y or 0, rel_tol=1e-6) for x, y in pairs)


def find_context(a: LlamaConfig, b: LlamaConfig) -> int:
    """Return the length of the longest sequence that both models take."""
    return min(a.max_position_embeddings, b.max_position_embeddings)


# --- tensors ---
@dataclass(frozen=True)
class _Gap:
    """The distance of two tensors: `peak` is the largest number of the first."""

    largest: float
    peak: float
    squares: float
    total: float

    @property
    def relative(self) -> float:
        if not self.largest:
            return 0.0

        return self.largest / self.peak if 0 < self.peak < math.inf else math.inf


def compare_tensors(a: StoredModel, b: StoredModel) -> Tensors:
    """Compare two checkpoints of one shape tensor by tensor; two are in memory at a time.

    A head that one of them shares with the embeddings is compared with the other's own.
    """
    names = dict.fromkeys([*a.tensors, *b.tensors])
    gaps = {name: _measure_gap(read_tensor(a, name), read_tensor(b, name)) for name in names}
    largest = max(gaps, key=lambda name: gaps[name].largest)
    relative = max(gaps, key=lambda name: gaps[name].relative)
    differs = gaps[largest].largest > 0
    squares = sum(gap.squares for gap in gaps.values())
    total = sum(gap.total for gap in gaps.values())

    return Tensors(
        count=len(gaps),
        equal=sum(gap.largest == 0 for gap in gaps.values()),
        largest=gaps[largest].largest,
        name=largest if differs else None,
        relative=gaps[relative].relative,
        relative_name=relative if differs else None,
        spread=math.sqrt(squares / total) if total else 0.0,
    )


def read_tensor(model: StoredModel, name: str) -> Tensor:
    """Read a tensor of a checkpoint, whose head may be its embeddings."""
    shared = name == HEAD and name not in model.tensors
    return model.tensors[EMBEDDINGS if shared else name].read()


def _measure_gap(x: Tensor, y: Tensor) -> _Gap:
    largest = peak = squares = total = 0.0
    kind = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    for left, right in zip(torch.split(x.reshape(-1), _CHUNK), torch.split(y.reshape(-1), _CHUNK)):
        a, b = left.to(kind), right.to(kind)
        total += a.square().sum().item()
        if torch.equal(a, b):
            continue

        gap = measure_difference(a, b)
        largest = max(largest, gap.max().item())
        squares += gap.square().sum().item()

    if largest:
        peak = max(part.abs().max().item() for part in torch.split(x.reshape(-1), _CHUNK))

    return _Gap(largest, peak, squares, total)


def measure_difference(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances of numbers; infinite if one of two is not a number and the other is."""
    same = (x == y) | (x.isnan() & y.isnan())
    return (x - y).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0)


# --- outputs ---
@torch.no_grad()
def compare_outputs(
    a: StoredModel,
    b: StoredModel,
    length: int,
    tolerance: float,
    device: torch.device,
    seed: int = 0,
) -> Outputs:
    """Compare the outputs of both models on one random sequence of `length` tokens, in fp32.

    They are the logits of language models at every position; of reward models the score after each
    token.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_1T = torch.randint(a.config.vocab_size, (1, length), generator=generator)
    if a.config.bos_token_id is not None:
        tokens_1T[0, 0] = a.config.bos_token_id

    tokens_1T = tokens_1T.to(device)

    x_TD, y_TD, first_layer = _find_hidden(a, b, tokens_1T, tolerance)
    output, tokens_T = SCORE if a.scorer else HEAD, tokens_1T[0]
    weights = [read_tensor(model, output).to(device, torch.float32) for model in (a, b)]
    gaps, items, total, agreeing = [], [], 0.0, 0
    for begin in range(0, length, _POSITIONS):
        chunk = slice(begin, begin + _POSITIONS)
        x_PV, y_PV = F.linear(x_TD[chunk], weights[0]), F.linear(y_TD[chunk], weights[1])
        gap_PV = measure_difference(x_PV, y_PV)
        largest_P, items_P = gap_PV.max(-1)
        gaps.append(largest_P)
        items.append(tokens_T[chunk] if a.scorer else items_P)
        total += gap_PV.mean(-1).sum().item()
        same = x_PV.sign() == y_PV.sign() if a.scorer else x_PV.argmax(-1) == y_PV.argmax(-1)
        agreeing += int(same.sum())

    gaps_T, items_T = torch.cat(gaps), torch.cat(items)
    position = int(gaps_T.argmax())
    beyond = (gaps_T > tolerance).nonzero().flatten().tolist()
    first = beyond[0] if beyond else None
    if first is not None and first_layer is None:
        first_layer = output

    return Outputs(
        kind="scores" if a.scorer else "logits",
        positions=length,
        largest=gaps_T[position].item(),
        mean=total / length,
        position=position,
        token=int(items_T[position]),
        agreeing=agreeing / length,
        first_position=first,
        first_token=None if first is None else int(items_T[first]),
        first_layer=first_layer,
    )


def _find_hidden(
    a: StoredModel, b: StoredModel, tokens_1T: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, str | None]:
    """Return the last hidden states of both models, and the first layer where they differ."""
    first_layer = None
    for (name, x_1TD), (_, y_1TD) in zip(_walk(a, tokens_1T), _walk(b, tokens_1T)):
        if first_layer is None and measure_difference(x_1TD, y_1TD).max().item() > tolerance:
            first_layer = name

    return x_1TD[0], y_1TD[0], first_layer


def _walk(model: StoredModel, tokens_1T: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream after each part of a model, by name, the normed hidden states last.

    One part is loaded at a time.
    """
    config = model.config
    x_1TD: Tensor = F.embedding(
        tokens_1T, model.tensors[EMBEDDINGS].read().to(tokens_1T.device, torch.float32)
    )
    yield EMBEDDINGS.removesuffix(".weight"), x_1TD

    with torch.device("meta"):
        trunk = Trunk(config)

    context = kernels.install(trunk).context(x_1TD)
    update_1TD: Tensor | None = None
    for index in range(config.num_hidden_layers):
        x_1TD, update_1TD = _load_layer(model, index, x_1TD)(x_1TD, update_1TD, context)
        yield f"model.layers.{index}", x_1TD + update_1TD

    norm = kernels.install(RMSNorm(config.hidden_size, config.rms_norm_eps))
    norm.weight = nn.Parameter(model.tensors[NORM].read().float())
    yield NORM.removesuffix(".weight"), norm.to(x_1TD.device)(x_1TD, update_1TD)[1]


def _load_layer(model: StoredModel, index: int, like: Tensor) -> Layer:
    with torch.device("meta"):
        layer = Layer(model.config, index)

    stored = {name: model.tensors[f"model.layers.{index}.{name}"] for name in layer.state_dict()}
    weights = {name: each.read().to(like.device, torch.float32) for name, each in stored.items()}
    layer.load_state_dict(weights, assign=True)
    return kernels.install(layer)
