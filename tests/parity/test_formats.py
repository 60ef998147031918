"""Through every format and back, against transformers, and Meta's files against Meta's own
formulas.

The network here is written from the papers: rotary positions as products of complex numbers over
neighbouring dimensions (RoFormer, equation 16 in the plane of each pair), and matrices cut between
ranks as in model-parallel training, so that each rank computes with its own file alone and only
sums and concatenations join them. Our code does neither. Shapes: T positions, H heads of a rank, K
its key heads, P pairs of a head, D hidden.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from commands import llama2
from sources import model_of, source_of
from torch import Tensor

from llama2.formats import checkpoint, meta
from llama2.formats.detect import open_model
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.positions import rotate
from llama2.model.tensors import interleave_pairs
from llama2.tokenizer import Tokenizer

transformers.utils.logging.disable_progress_bar()
LENGTH = 1500
SHAPE = LlamaConfig(
    vocab_size=420,
    hidden_size=128,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)
RATIOS = [32, 16, 8, 4]
"""key heads for 32 query heads: plain attention and three ratios of grouped queries; four ranks can
share each"""
TOLERANCE = 1e-4


def tokens() -> Tensor:
    return torch.randint(
        3, SHAPE.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0)
    )


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def heads_of_a_rank(file: dict[str, Tensor], layer: int, x_TD: Tensor, size: int) -> Tensor:
    """What the heads in one rank's file add to the stream."""

    def part(name: str) -> Tensor:
        return file[f"layers.{layer}.attention.{name}.weight"]

    length = len(x_TD)
    theta_P = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    turn_TP = torch.polar(
        torch.ones(1, dtype=torch.float64), torch.arange(length)[:, None] * theta_P
    )
    q_THP, k_TKP = (
        torch.view_as_complex((x_TD @ part(name).T).view(length, -1, size // 2, 2))
        * turn_TP[:, None]
        for name in ("wq", "wk")
    )
    v_TKE = (x_TD @ part("wv").T).view(length, -1, size)
    group = q_THP.shape[1] // k_TKP.shape[1]
    future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = []

    for head in range(q_THP.shape[1]):
        scores_TT = (q_THP[:, head] @ k_TKP[:, head // group].conj().T).real / size**0.5
        weights_TT = scores_TT.masked_fill(future_TT, -torch.inf).softmax(-1)
        out.append(weights_TT @ v_TKE[:, head // group])

    return torch.cat(out, -1) @ part("wo").T


def metas_logits(directory: Path, tokens_T: Tensor) -> Tensor:
    """The logits of a directory of Meta's, in fp64."""
    values = json.loads((directory / "params.json").read_text())
    files = [
        {name: tensor.double() for name, tensor in torch.load(path, weights_only=True).items()}
        for path in sorted(directory.glob("consolidated.*.pth"))
    ]
    eps, size = values["norm_eps"], values["dim"] // values["n_heads"]
    x_TD = torch.cat([file["tok_embeddings.weight"][tokens_T] for file in files], -1)

    for layer in range(values["n_layers"]):
        prefix = f"layers.{layer}"
        normed_TD = norm(x_TD, files[0][f"{prefix}.attention_norm.weight"], eps)
        for file in files:
            x_TD = x_TD + heads_of_a_rank(file, layer, normed_TD, size)

        normed_TD = norm(x_TD, files[0][f"{prefix}.ffn_norm.weight"], eps)
        for file in files:
            gate, down, up = (
                file[f"{prefix}.feed_forward.w{number}.weight"] for number in (1, 2, 3)
            )
            opened = normed_TD @ gate.T
            x_TD = x_TD + (opened * opened.sigmoid() * (normed_TD @ up.T)) @ down.T

    normed_TD = norm(x_TD, files[0]["norm.weight"], eps)
    return torch.cat([normed_TD @ file["output.weight"].T for file in files], -1)


def loaded(path: Path) -> Llama:
    """Our model of a checkpoint in any format."""
    source = open_model(path)
    model = Llama(source.config).eval()
    model.load_state_dict({name: stored.read() for name, stored in source.tensors.items()})

    return model


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_metas_formulas_give_our_logits_from_the_files_we_write(
    tmp_path: Path, kv_heads: int, shards: int
) -> None:
    model = model_of(replace(SHAPE, num_key_value_heads=kv_heads))
    meta.write(source_of(model, tmp_path), tmp_path / "meta", shards=shards)
    with torch.no_grad():
        ours_TV = model(tokens())[0]
        theirs_TV = metas_logits(tmp_path / "meta", tokens()[0])

    assert ours_TV.std() > 0.5
    assert (ours_TV - theirs_TV).abs().max() < TOLERANCE


def test_without_the_permutation_the_formulas_give_something_else(tmp_path: Path) -> None:
    """The comparison above can fail: rows in our order are wrong in Meta's files."""
    model = model_of(SHAPE)
    meta.write(source_of(model, tmp_path), tmp_path / "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    held = torch.load(path, weights_only=True)

    for layer in range(SHAPE.num_hidden_layers):
        for theirs, ours in (("wq", "q_proj"), ("wk", "k_proj")):
            held[f"layers.{layer}.attention.{theirs}.weight"] = model.state_dict()[
                f"model.layers.{layer}.self_attn.{ours}.weight"
            ]

    torch.save(held, path)
    with torch.no_grad():
        assert (model(tokens())[0] - metas_logits(tmp_path / "meta", tokens()[0])).abs().max() > 0.1


@pytest.mark.parametrize("kv_heads", RATIOS)
def test_rotated_scores_depend_on_the_distance_as_the_paper_says(kv_heads: int) -> None:
    """⟨R_m q, R_n k⟩ with complex products over interleaved rows is our score over half-split
    rows."""
    shape = replace(SHAPE, num_key_value_heads=kv_heads, num_hidden_layers=1)
    model = model_of(shape)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(3, shape.hidden_size, generator=generator)
    positions = torch.tensor([0, 7, 4000])
    attention = model.model.layers[0].self_attn
    context = model.model.context(x_TD[None], None, positions[None], None)
    size = shape.head_dim
    theta_P = shape.rope_theta ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)

    for project, heads in ((attention.q_proj, 32), (attention.k_proj, kv_heads)):
        rows = project.weight.detach()
        halves = (x_TD @ rows.T).view(1, 3, heads, size)
        pairs = (x_TD @ interleave_pairs(rows, heads).T).view(3, heads, size // 2, 2)
        ours_THE = rotate(halves, context.cos_BT1E, context.sin_BT1E)[0].double()
        turned = (
            torch.view_as_complex(pairs.double())
            * torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * theta_P)[:, None]
        )
        ours_THH = torch.einsum("ahe,bhe->hab", ours_THE, ours_THE)
        theirs_THH = torch.einsum("ahp,bhp->hab", turned, turned.conj()).real
        assert (ours_THH - theirs_THH).abs().max() < 1e-3 * ours_THH.abs().max()


@pytest.mark.parametrize(("kv_heads", "shards"), list(zip(RATIOS, [1, 2, 4, 4])))
def test_a_model_comes_back_from_its_journey_through_every_format(
    tmp_path: Path, shared: Path, tokenizer: Tokenizer, kv_heads: int, shards: int
) -> None:
    """transformers -> ours -> Meta -> ours -> GGUF -> ours -> llama2.c -> ours -> transformers."""
    model = model_of(replace(SHAPE, num_key_value_heads=kv_heads))
    checkpoint.save(model, tmp_path / "begin")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "begin", attn_implementation="eager"
    )
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    path = tmp_path / "hf"

    for number, options in enumerate(
        (["hf"], ["meta", "--shards", shards], ["hf"], ["gguf"], ["hf"], ["llama2c"], ["hf"])
    ):
        out = (
            tmp_path
            / f"{number}{'.gguf' if options == ['gguf'] else '.bin' if options == ['llama2c'] else ''}"
        )
        assert llama2("export", path, "--to", *options, "--out", out, "--length", 64) == 0
        path = out

    assert llama2("verify", tmp_path / "hf", path, "--length", 64, "--tolerance", 0) == 0
    assert checkpoint.config_of(path) == model.config
    with torch.no_grad():
        expected = theirs(tokens()).logits
        assert expected.std() > 0.5
        assert (loaded(path)(tokens()) - expected).abs().max() < TOLERANCE
        again = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        assert torch.equal(again(tokens()).logits, expected)
