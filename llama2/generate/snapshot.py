"""The weights that an engine samples with: those of a model that may go on being trained.

Sampling reads weights in one piece, in one type, perhaps rounded to integers, and on a CPU packed
for our own decoding step. The model's own are used as they are where they allow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama2 import kernels
from llama2.errors import UserError
from llama2.generate import cpu_decoder
from llama2.generate.cpu_decoder import CpuDecoder
from llama2.model import quantize
from llama2.model.linear import is_hooked
from llama2.model.llama import Llama
from llama2.model.quantize import QuantizedWeight, WeightPrecision
from llama2.model.replica import empty_copy, structure


class Snapshot:
    """The weights of `source` as they were at the last `refresh`.

    `model` computes with them. UserError for "int4" without torchao.
    """

    def __init__(self, source: Llama, precision: WeightPrecision) -> None:
        quantize.check(precision)
        self.source = self.model = kernels.install(source)
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._bits = precision if precision == "int8" or precision == "int4" else None
        self._copy: Llama | None = None
        self._integers: dict[
            str, QuantizedWeight
        ] = {}  # matrices of the copy, until they are packed
        self._decoder: CpuDecoder | None = None
        self._version: list[tuple[int, int]] | None = None
        self._structure = structure(source)

    def replace_source(self, source: Llama) -> None:
        """Take the weights of another model of the same shape at the next `refresh`."""
        if source.config != self.source.config:
            raise ValueError("the weights are of a model of another shape")

        self.source, self._version = kernels.install(source), None

    def is_stale(self) -> bool:
        """Return whether the source may hold other weights by now.

        Those that may be trained always count as changed: a fused optimizer leaves no trace of what
        it writes. Sharded ones too, so that all ranks gather together. Others do where something
        wrote to them, or a module was replaced, wrapped or hooked.
        """
        version = self._source_version()
        changed = version is None or version != self._version
        return changed or structure(self.source) != self._structure

    def refresh(self) -> None:
        """Take the weights anew: gather, cast, quantize; `decoder` packs them when it is first
        asked for."""
        modules = structure(self.source)
        if modules != self._structure:
            self._copy, self._structure = None, modules

        self._version, self._decoder = self._source_version(), None
        weights = list(self.source.parameters())
        cast = any(_is_sharded(weight) or weight.dtype != self.dtype for weight in weights)
        if self._bits is None and not cast:
            self.model = self.source
            return

        if self._copy is None:
            self._copy = _allocate(self.source, self.dtype)

        self.model = self._copy
        with torch.inference_mode():
            for (name, target), weight in zip(self._copy.named_parameters(), weights, strict=True):
                target.copy_(_gather(weight))
                self._quantize(name, target)

            for held, buffer in zip(self._copy.buffers(), self.source.buffers(), strict=True):
                held.copy_(buffer)

        if not cpu_decoder.supports(self._copy):
            self._integers = {}

    @property
    def decoder(self) -> CpuDecoder | None:
        """The weights as our own decoding step reads them, None where that does not run."""
        if self._decoder is None and cpu_decoder.supports(self.model):
            self._decoder = CpuDecoder(self.model, self._integers)
            self._integers = {}

        return self._decoder

    def _quantize(self, name: str, weight: Tensor) -> None:
        """Put into a parameter of the copy what its integers stand for, if it is to be rounded."""
        tied = self.source.config.tie_word_embeddings
        if self._bits is None or quantize.reason_to_keep(name, weight, self._bits, tied=tied):
            return

        integers = quantize.quantize(weight, self._bits)
        weight.copy_(integers.dequantize())
        self._integers[name] = integers

    def _source_version(self) -> list[tuple[int, int]] | None:
        """Return what changes whenever frozen weights do; None for weights that always count as
        changed."""
        weights = list(self.source.parameters())
        if any(weight.requires_grad or _is_sharded(weight) for weight in weights):
            return None

        tensors = (*weights, *self.source.buffers())
        return [(tensor.data_ptr(), _count_writes(tensor)) for tensor in tensors]


def _count_writes(tensor: Tensor) -> int:
    # a tensor made for inference counts none, and cannot be trained
    return 0 if tensor.is_inference() else tensor._version


def _is_sharded(weight: Tensor) -> bool:
    # told by its method: the class of sharded tensors takes half a second to import
    return hasattr(weight, "full_tensor")


def _gather(weight: Tensor) -> Tensor:
    if not _is_sharded(weight):
        return weight

    # in inference mode PyTorch 2.11 cannot gather
    with torch.inference_mode(False), torch.no_grad():
        full: Tensor = weight.full_tensor()  # type: ignore[attr-defined]

    return full


def _allocate(model: Llama, dtype: torch.dtype) -> Llama:
    """Return a model of the same shape, unsharded, with memory for weights of `dtype`."""
    if not any(_is_sharded(weight) for weight in model.parameters()):
        return empty_copy(model, dtype)

    leaves = [module for module in model.modules() if not any(module.children())]
    if any(is_hooked(module) for module in leaves):
        raise UserError(
            "a model spread over ranks is sampled from a copy, which would lack the hooks of its "
            "modules",
            "remove them, or train with --training.parallel replicate",
        )

    with torch.device("meta"):
        blank = Llama(model.config)

    return kernels.install(blank).to(dtype).to_empty(device=model.device)
