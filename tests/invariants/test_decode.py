"""Our own decoding step gives the logits of the model itself, whatever else is in the batch."""

import shutil

import pytest
import torch

from llama2.generate import cpu_decoder
from llama2.model import quantize
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, LlamaConfig

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no compiler"
)
SHAPES = {
    "gqa, odd sizes": LlamaConfig(97, 80, 104, 2, 4, 2, 64),
    "mha, tied": LlamaConfig(96, 64, 96, 2, 4, 4, 64, tie_word_embeddings=True),
    "mqa": LlamaConfig(120, 60, 50, 2, 6, 1, 64, rope_theta=500.0),
}


def build(shape: LlamaConfig, kind: torch.dtype) -> Llama:
    model = Llama(shape, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() == 2 else parameter.copy_(
                torch.rand_like(parameter) + 0.5
            )

    return model.to(kind).eval()


def cache(shape: LlamaConfig, kind: torch.dtype, slots: int) -> KVCache:
    return KVCache(
        shape.num_hidden_layers,
        slots,
        shape.num_key_value_heads,
        32,
        shape.head_dim,
        dtype=kind,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rows", [1, 5, 18])
@torch.inference_mode()
def test_logits_are_the_models(
    shape: LlamaConfig, kind: torch.dtype, tolerance: float, rows: int
) -> None:
    model, decoder = build(shape, kind), None
    assert cpu_decoder.supports(model)
    decoder = cpu_decoder.CpuDecoder(model)
    own, theirs = cache(shape, kind, rows + 1), cache(shape, kind, rows + 1)
    begins = torch.arange(rows) % 3  # rows of different lengths

    for step in range(10):
        tokens, positions = torch.randint(0, shape.vocab_size, (rows,)), begins + step
        theirs.decode(positions, 16)
        expected = model(tokens[:, None], positions_BT=positions[:, None], cache=theirs)[:, 0]
        found = decoder(tokens, positions, own)
        assert (found - expected).norm() < tolerance * expected.norm()

    if kind == torch.float32:
        assert (own.data_LPNCKD - theirs.data_LPNCKD).abs().max() < 1e-5, (
            "keys and values go where the model puts them"
        )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_alone_equals_a_row_among_others_to_the_last_bit(kind: torch.dtype) -> None:
    shape = SHAPES["gqa, odd sizes"]
    decoder = cpu_decoder.CpuDecoder(build(shape, kind))
    together = cache(shape, kind, 21)
    apart = [cache(shape, kind, 1) for _ in range(21)]

    for step in range(6):
        tokens, positions = torch.randint(0, 97, (21,)), torch.full((21,), step)
        found = decoder(tokens, positions, together)
        for row in range(21):
            assert torch.equal(
                decoder(tokens[row : row + 1], positions[row : row + 1], apart[row])[0], found[row]
            )


def test_mixed_or_other_precisions_are_left_to_pytorch() -> None:
    model = build(SHAPES["mqa"], torch.float32)
    model.model.norm.bfloat16()
    assert not cpu_decoder.supports(model)
    assert not cpu_decoder.supports(build(SHAPES["mqa"], torch.float16))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_integers_are_read_as_what_they_stand_for(shape: LlamaConfig, bits: quantize.Bits) -> None:
    """In 4 bits the very bf16 numbers that PyTorch multiplies with; in 8 bits before they are
    rounded to bf16."""
    if bits == "int4":
        pytest.importorskip("torchao")

    model = build(shape, torch.bfloat16)
    integers = {
        name: quantize.quantize(weight, bits)
        for name, weight in model.named_parameters()
        if not quantize.reason_to_keep(name, weight, bits, tied=shape.tie_word_embeddings)
    }
    decoder = cpu_decoder.CpuDecoder(model, integers)

    for name, found in integers.items():
        model.get_parameter(name).copy_(found.dequantize())

    same = cpu_decoder.CpuDecoder(model)
    own, theirs, plain = (cache(shape, torch.bfloat16, 7) for _ in range(3))
    for step in range(6):
        tokens, positions = torch.randint(0, shape.vocab_size, (7,)), torch.full((7,), step)
        theirs.decode(positions, 16)
        expected = model(tokens[:, None], positions_BT=positions[:, None], cache=theirs)[:, 0]
        found_BV = decoder(tokens, positions, own)
        assert (found_BV - expected).norm() < 0.03 * expected.norm()

        if bits == "int4":
            assert torch.equal(found_BV, same(tokens, positions, plain))
