"""What must not change the result: packing, padding, how attention is computed, checkpointing,
chunks, compiling."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.kernels import fused, install
from llama2.model import likelihood, llama, positions
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer

VOCABULARY = 97


def config(kv_heads: int = 2, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


def build(kv_heads: int = 2, tied: bool = False) -> Llama:
    """A model with weights ten times the usual, so that a wrong mask or position shows."""
    model = Llama(config(kv_heads, tied), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)

    return install(model)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max().clamp(
            min=1e-3
        ), name


@pytest.mark.parametrize("explicit_length", [512, 0], ids=["explicit", "fused"])
def test_packed_equals_unpacked(monkeypatch: pytest.MonkeyPatch, explicit_length: int) -> None:
    monkeypatch.setattr(llama, "EXPLICIT_LENGTH", explicit_length)
    monkeypatch.setattr(fused, "supports", lambda x: False)
    model = build()
    documents = [tokens(1, length, seed=length) for length in (7, 1, 12, 5)]
    packed_BT = torch.cat(documents, 1)
    ids_BT = torch.cat(
        [torch.full_like(document, index) for index, document in enumerate(documents)], 1
    )
    alone = torch.cat([model(document) for document in documents], 1)
    together = model(packed_BT, documents_BT=ids_BT)
    assert (alone - together).abs().max() < 1e-4
    # without the mask documents do see each other
    assert (model(packed_BT) - alone).abs().max() > 0.1


def test_packed_gradients_equal_unpacked() -> None:
    model = build()
    first, second = tokens(1, 9, seed=2), tokens(1, 14, seed=3)
    ids_BT = torch.tensor([[4] * 9 + [2] * 14])
    pair = torch.cat((first, second), 1)
    apart = gradients(
        model, model(first, targets_BT=first).sum() + model(second, targets_BT=second).sum()
    )
    assert_close(
        gradients(model, model(pair, documents_BT=ids_BT, targets_BT=pair).sum()), apart, 1e-4
    )


def test_positions_restart_with_each_run_of_a_document() -> None:
    documents_BT = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5, 4]])
    assert positions.positions_within(documents_BT).tolist() == [
        [0, 1, 0, 1, 2, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 0],
    ]


def test_right_padding_and_row_order_do_not_matter() -> None:
    model = build()
    scorer = install(Scorer(config(), seed=2))
    lengths = [5, 11, 1, 8]
    rows = [tokens(1, length, seed=length) for length in lengths]

    for padding in (0, 3):
        batch = torch.cat([F.pad(row, (0, 16 - row.shape[1]), value=padding) for row in rows])
        logits = model(batch)
        scores = scorer(batch, lengths_B=torch.tensor(lengths))
        values = scorer(batch)

        for index, row in enumerate(rows):
            assert (logits[index, : lengths[index]] - model(row)[0]).abs().max() < 1e-4
            alone = scorer(row, lengths_B=torch.tensor([lengths[index]]))[0]
            assert abs(scores[index] - alone) < 1e-5
            assert abs(values[index, lengths[index] - 1] - alone) < 1e-5

    assert (
        scorer(batch.flip(0), lengths_B=torch.tensor(lengths[::-1])).flip(0) - scores
    ).abs().max() < 1e-5
    assert scores.std() > 0.01


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_explicit_attention_equals_fused(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, packed: bool
) -> None:
    monkeypatch.setattr(fused, "supports", lambda x: False)
    model = build(kv_heads)
    tokens_BT = tokens(2, 20)
    documents_BT = torch.arange(20)[None].expand(2, -1) // 8 if packed else None
    found = []

    for limit in (512, 0):
        monkeypatch.setattr(llama, "EXPLICIT_LENGTH", limit)
        logp_BT = model(tokens_BT, targets_BT=tokens_BT.roll(-1, 1), documents_BT=documents_BT)
        found.append((logp_BT.detach(), gradients(model, logp_BT.sum())))

    assert (found[0][0] - found[1][0]).abs().max() < 1e-4
    assert_close(found[0][1], found[1][1], 1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = build()
    tokens_BT = tokens(2, 20)
    plain = gradients(model, model(tokens_BT, targets_BT=tokens_BT).sum())
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.gradient_checkpointing = True
    again = gradients(model, model(tokens_BT, targets_BT=tokens_BT).sum())
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert_close(again, plain, 0.0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_cache_gives_the_same_logits(kv_heads: int) -> None:
    model = build(kv_heads)
    tokens_BT = tokens(3, 16)
    lengths = [9, 4, 6]
    cache = KVCache(2, 3, kv_heads, 32, 16, dtype=torch.float32, device=torch.device("cpu"))

    with torch.no_grad():
        whole = model(tokens_BT)
        cache.prefill(torch.arange(3), 9)
        logits = model(tokens_BT[:, :9], positions_BT=torch.arange(9)[None], cache=cache)
        assert (logits[0] - whole[0, :9]).abs().max() < 1e-4

        for step in range(4):
            at_B = torch.tensor(lengths) + step
            cache.decode(at_B, int(at_B.max()) + 1)
            one = model(tokens_BT.gather(1, at_B[:, None]), positions_BT=at_B[:, None], cache=cache)
            assert (one[:, 0] - whole[torch.arange(3), at_B]).abs().max() < 1e-4


def reference(model: Llama, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    return -F.cross_entropy(model(tokens_BT).mT, targets_BT, reduction="none")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("keep", "chunk"),
    [(1 << 30, 1), (1 << 30, 1 << 30), (0, 1)],
    ids=["kept", "one-chunk", "recomputed"],
)
def test_likelihood_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, tied: bool, keep: int, chunk: int
) -> None:
    """Values and gradients for an arbitrary upstream weight, in chunks of 32 tokens with a ragged
    last one."""
    monkeypatch.setattr(likelihood, "KEEP_BYTES", keep)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(likelihood, "CHUNK_ROWS", 32)
    model = install(Llama(config(tied=tied), seed=1))
    tokens_BT, targets_BT = tokens(3, 27), tokens(3, 27, seed=2)
    weight_BT = torch.randn(3, 27, generator=torch.Generator().manual_seed(3))
    weight_BT[0, :5] = 0
    expected = reference(model, tokens_BT, targets_BT)
    found = model(tokens_BT, targets_BT=targets_BT)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    exact = gradients(model, (expected * weight_BT).sum())
    assert_close(gradients(model, (found * weight_BT).sum()), exact, 1e-5)


def test_likelihood_keeps_no_logits_when_nothing_is_trained() -> None:
    model = build()
    with torch.no_grad():
        logp_BT = model(tokens(2, 20), targets_BT=tokens(2, 20, seed=2))

    assert not logp_BT.requires_grad
    assert (logp_BT - reference(model, tokens(2, 20), tokens(2, 20, seed=2))).abs().max() < 1e-4


@pytest.mark.parametrize("keep", [1 << 30, 0], ids=["kept", "recomputed"])
def test_likelihood_in_bf16_is_as_good_as_autocast_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(likelihood, "KEEP_BYTES", keep)
    model = build(tied=True)
    tokens_BT, targets_BT = tokens(3, 40), tokens(3, 40, seed=2)
    exact = gradients(model, reference(model, tokens_BT, targets_BT).sum())
    errors = []

    for direct in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            logp_BT = (
                model(tokens_BT, targets_BT=targets_BT)
                if direct
                else reference(model, tokens_BT, targets_BT)
            )

        assert logp_BT.dtype == torch.float32
        found = gradients(model, logp_BT.sum())
        errors.append(
            sum((found[name] - exact[name]).norm() / exact[name].norm() for name in exact)
            / len(exact)
        )

    assert errors[0] < 0.05
    assert errors[0] < 1.1 * errors[1]


def test_entropy_is_that_of_the_predictions_and_carries_no_gradient() -> None:
    model = build()
    tokens_BT = tokens(2, 40)
    logp_BT, entropy_BT = model(tokens_BT, targets_BT=tokens_BT, entropy=True)
    expected = torch.distributions.Categorical(logits=model(tokens_BT)).entropy()
    assert (entropy_BT - expected).abs().max() < 1e-4
    assert not entropy_BT.requires_grad
    assert torch.equal(logp_BT, model(tokens_BT, targets_BT=tokens_BT))
    alone = gradients(model, logp_BT.sum())
    assert_close(gradients(model, model(tokens_BT, targets_BT=tokens_BT).sum()), alone, 1e-6)


def test_head_false_gives_what_the_head_reads() -> None:
    model = build()
    hidden_BTD = model(tokens(2, 9), head=False)
    assert hidden_BTD.shape == (2, 9, 64)
    assert torch.equal(model.logits(hidden_BTD), model(tokens(2, 9)))


def test_a_prefix_never_sees_what_follows() -> None:
    model = build()
    whole = model(tokens(1, 30))
    for begin, end in pairwise((1, 5, 30)):
        assert (model(tokens(1, 30)[:, :end])[:, begin:] - whole[:, begin:end]).abs().max() < 1e-4


# the tracer's own doing
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_model_is_one_graph_and_compiled_equals_eager() -> None:
    model = build(tied=True)
    tokens_BT, targets_BT = tokens(2, 32), tokens(2, 32, seed=2)
    documents_BT = torch.arange(32)[None].expand(2, -1) // 12
    eager_BT = model(tokens_BT, targets_BT=targets_BT, documents_BT=documents_BT)
    expected = gradients(model, eager_BT.sum())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found_BT = compiled(tokens_BT, targets_BT=targets_BT, documents_BT=documents_BT)
    assert (found_BT - eager_BT).abs().max() < 1e-4
    assert_close(gradients(model, found_BT.sum()), expected, 1e-4)
