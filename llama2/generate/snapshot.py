"""The weights that an engine samples with: those of a model that may go on being trained.

Sampling reads weights in one piece, in one type, perhaps rounded to integers, and on a CPU packed
for our own decoding step. The model's own are used as they are where they allow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama2.generate import cpu_decoder
from llama2.generate.cpu_decoder import Decoder
from llama2.model import quantize
from llama2.model.llama import Llama
from llama2.model.quantize import Rounded, WeightPrecision


class Snapshot:
    """The weights of `source` as they were at the last `refresh`.

    `model` computes with them. UserError for "int4" without torchao.
    """

    def __init__(self, source: Llama, precision: WeightPrecision) -> None:
        quantize.check(precision)
        self.source, self.model = source, source
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._bits = precision if precision == "int8" or precision == "int4" else None
        self._copy: Llama | None = None
        self._integers: dict[str, Rounded] = {}  # matrices of the copy, until they are packed
        self._decoder: Decoder | None = None
        self._version: list[tuple[int, int]] | None = None

    def replace_source(self, source: Llama) -> None:
        """Take the weights of another model of the same shape at the next `refresh`."""
        if source.config != self.source.config:
            raise ValueError("the weights are of a model of another shape")

        self.source, self._version = source, None

    def is_stale(self) -> bool:
        """Return whether the source may hold other weights by now.

        Those that may be trained always count as changed: a fused optimizer leaves no trace of what
        it writes. Sharded ones too, so that all ranks gather together.
        """
        version = self._source_version()
        return version is None or version != self._version

    def refresh(self) -> None:
        """Take the weights anew: gather, cast, quantize; `decoder` packs them when it is first
        asked for."""
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

        if not cpu_decoder.runs(self._copy):
            self._integers = {}

    @property
    def decoder(self) -> Decoder | None:
        """The weights as our own decoding step reads them, None where that does not run."""
        if self._decoder is None and cpu_decoder.runs(self.model):
            self._decoder = Decoder(self.model, self._integers)
            self._integers = {}

        return self._decoder

    def _quantize(self, name: str, weight: Tensor) -> None:
        """Put into a parameter of the copy what its integers stand for, if it is to be rounded."""
        tied = self.source.config.tie_word_embeddings
        if self._bits is None or quantize.kept(name, weight, self._bits, tied=tied):
            return

        integers = quantize.rounded(weight, self._bits)
        weight.copy_(integers.weight())
        self._integers[name] = integers

    def _source_version(self) -> list[tuple[int, int]] | None:
        """Return what changes whenever frozen weights do; None for weights that always count as
        changed."""
        version = []
        for weight in self.source.parameters():
            if weight.requires_grad or _is_sharded(weight):
                return None

            # one made for inference counts no writes
            writes = 0 if weight.is_inference() else weight._version
            version.append((weight.data_ptr(), writes))

        return version


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
    with torch.device("meta"):
        blank = Llama(model.config)

    return blank.to(dtype).to_empty(device=next(model.parameters()).device)
