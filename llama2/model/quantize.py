"""Weights quantized to 8 or 4 bits: which of them, how, and what stands for them in a product.

int8: each output has a scale; integers lie in -127..127. int4: each 32 inputs of an output share a
scale and a zero point, chosen by torchao (its public configuration for integers of few bits, which
runs on every processor). Products stay bf16: a quantized matrix is read as the bf16 numbers it
stands for, and only what a decoding step fetches from memory gets smaller. The paper serves its
models as they are and says nothing of this.

Norms are vectors and stay. An embedding that is no head is looked up, not multiplied: integers
would cost accuracy and save no time. The head keeps bf16 in int4, where each of its errors would be
an error of a logit.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.devices import Precision
from llama2.errors import explain_missing_extra
from llama2.model.tensors import EMBEDDINGS, HEAD

Bits = Literal["int8", "int4"]
WeightPrecision = Literal["fp32", "bf16", "int8", "int4"]  # of the weights that an engine keeps
# inputs that share a scale in int4; it divides the inputs of nearly all models, and is a step of a
# product
GROUP = 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as integers: weight ≈ (integers - zeros) · scales."""

    integers_OI: Tensor  # int8; in int4 -8..7, the inputs filled up to whole groups
    scales_OG: Tensor  # fp32; in int4 numbers that bf16 holds exactly
    zeros_OG: Tensor | None  # int8, -8..7; none in int8
    inputs: int

    def dequantize(self) -> Tensor:
        """Return the fp32 matrix [O, inputs] that is meant."""
        if self.zeros_OG is None:
            return self.integers_OI * self.scales_OG

        integers_OGI = self.integers_OI.view(*self.scales_OG.shape, -1)
        weight_OGI = (integers_OGI - self.zeros_OG[..., None]) * self.scales_OG[..., None]
        return weight_OGI.flatten(1)[:, : self.inputs]


def compute_precision(precision: WeightPrecision) -> Precision:
    """Return the precision of products over weights that are kept in `precision`."""
    return "fp32" if precision == "fp32" else "bf16"


def load_dtype(precision: WeightPrecision) -> torch.dtype:
    """Return the dtype to load a checkpoint in: integers are made from bf16."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def reason_to_keep(name: str, weight: Tensor, bits: Bits, *, tied: bool) -> str:
    """Say why a parameter of a language model is not quantized; return "" if it is. `tied`: the
    embedding is also the head."""
    if weight.dim() != 2:
        return "a vector"
    if name == EMBEDDINGS and not tied:
        return "looked up, not multiplied"
    if name in (EMBEDDINGS, HEAD) and bits == "int4":
        return "the head: its errors are errors of logits"

    return ""


def count_bytes(outputs: int, inputs: int, bits: Bits) -> int:
    """Count the bytes that a decoding step reads of a quantized matrix: besides the integers in
    int8 a scale of fp32 for each output, in int4 a scale of bf16 and a zero point of a byte for
    each group."""
    groups = -(-inputs // GROUP)
    return outputs * (inputs + 4) if bits == "int8" else outputs * groups * (GROUP // 2 + 3)


def check(precision: WeightPrecision) -> None:
    """Raise UserError if this precision needs a library that is not installed."""
    if precision == "int4":
        _torchao()


def quantize(weight_OI: Tensor, bits: Bits) -> QuantizedWeight:
    """Return the integers and scales nearest to a matrix; in int8 it is met within half a scale.
    UserError without torchao."""
    weight_OI = weight_OI.detach().float()
    outputs, inputs = weight_OI.shape
    if bits == "int8":
        scales_O1 = (weight_OI.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        integers_OI = (weight_OI / scales_O1).round().clamp(-127, 127).to(torch.int8)
        return QuantizedWeight(integers_OI, scales_O1, None, inputs)

    ao = _torchao()
    # whole groups, filled up with zeros: a zero is always among the numbers that a group can hold
    padded_OI = F.pad(weight_OI, (0, -inputs % GROUP))
    with torch.device("meta"):
        layer = nn.Linear(padded_OI.shape[1], outputs, bias=False)

    layer.weight = nn.Parameter(padded_OI, requires_grad=False)
    four_bits = torch.int4  # type: ignore[attr-defined]
    ao.quantize_(
        layer, ao.IntxWeightOnlyConfig(four_bits, ao.PerGroup(GROUP), ao.MappingType.ASYMMETRIC)
    )
    theirs: Any = layer.weight  # torchao's tensor; zero points come in the type of the integers

    return QuantizedWeight(
        theirs.qdata,
        theirs.scale.bfloat16().float().view(outputs, -1),
        theirs.zero_point.to(torch.int8).view(outputs, -1),
        inputs,
    )


def _torchao() -> Any:
    """Import torchao's quantization, without the warnings about its kernels for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao import quantization
    except ImportError:
        raise explain_missing_extra("torchao", "quantize") from None
    finally:
        logging.disable(before)

    return quantization
