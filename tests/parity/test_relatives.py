"""Llama 2's relatives against transformers, on random weights: heads of another size, scaled rotary
positions, biases in attention, tied heads."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from relatives import PLAIN, QWEN, RELATIVES, SCALINGS, theirs
from torch import Tensor, nn

from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.kernels import fused, install
from llama2.model.config import LlamaConfig
from llama2.model.llama import Llama
from llama2.model.rope import rotary_frequencies

transformers.utils.logging.disable_progress_bar()
LENGTH = 400  # tokens, of an original context of 64
CAUSAL = {name: shape for name, shape in RELATIVES.items() if name != "dynamic"}
DYNAMIC = RELATIVES["dynamic"]


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def ours(shape: LlamaConfig, hf: nn.Module) -> Llama:
    model = install(Llama(shape)).eval()
    model.load_state_dict(hf.state_dict(), strict=not shape.tie_word_embeddings)
    return model


def tokens(length: int, rows: int = 1) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def decoded(hf: nn.Module, tokens_1T: Tensor, prompt: int) -> Tensor:
    """transformers' logits behind each token, those after the prompt read one by one."""
    out = hf(tokens_1T[:, :prompt], use_cache=True)
    logits = [out.logits]
    for index in range(prompt, tokens_1T.shape[1]):
        out = hf(
            tokens_1T[:, index : index + 1], past_key_values=out.past_key_values, use_cache=True
        )
        logits.append(out.logits)

    return torch.cat(logits, 1)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers_to_the_bit(scaling: object) -> None:
    shape = replace(PLAIN, head_dim=64, rope_scaling=scaling)
    rotary = theirs(shape).model.rotary_emb
    frequencies = rotary_frequencies(64, shape.rope_theta, shape.rope_scaling, torch.device("cpu"))
    assert torch.equal(frequencies, rotary.inv_freq)
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.amplitude == rotary.attention_scaling


@pytest.mark.parametrize("shape", CAUSAL.values(), ids=CAUSAL)
def test_logits_equal_transformers_beyond_the_original_context(
    monkeypatch: pytest.MonkeyPatch, shape: LlamaConfig
) -> None:
    hf = theirs(shape)
    model, tokens_BT = ours(shape, hf), tokens(LENGTH, 2)
    expected = hf(tokens_BT).logits
    assert expected.std() > 0.3
    truth = hf.double()(tokens_BT).logits.float()
    bound = max(1e-5, 2 * (expected - truth).abs().max().item())
    assert (model(tokens_BT) - truth).abs().max() < bound, "our kernels err as little"
    monkeypatch.setattr(fused, "supports", lambda x: False)
    assert (model(tokens_BT) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", CAUSAL.values(), ids=CAUSAL)
def test_cached_decoding_equals_transformers(shape: LlamaConfig) -> None:
    """A prompt beyond the original context, and tokens behind it one by one: log-probabilities of
    the engine against a cache of transformers."""
    hf, sequence_1T = theirs(shape), tokens(100)
    prompt = sequence_1T[0, :80].tolist()
    sampling = Sampling(temperature=0, max_tokens=40)
    (answer,) = Engine(ours(shape, hf), precision="fp32").generate([prompt], sampling)[0]
    whole_1T = torch.tensor([[*prompt, *answer.tokens]])
    logp_V = decoded(hf, whole_1T, 80)[0, 79:-1].log_softmax(-1)
    expected = logp_V.gather(1, whole_1T[0, 80:, None])[:, 0]
    assert whole_1T[0, 80:].tolist() == logp_V.argmax(-1).tolist()
    assert (torch.tensor(answer.logprobs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", CAUSAL.values(), ids=CAUSAL)
def test_greedy_answers_are_those_of_transformers(shape: LlamaConfig) -> None:
    hf = theirs(shape)
    prompts = [tokens(5)[0].tolist(), tokens(70)[0].tolist()]
    completions = Engine(ours(shape, hf), precision="fp32").generate(
        prompts, Sampling(temperature=0, max_tokens=100)
    )
    for prompt, (answer,) in zip(prompts, completions):
        generated = hf.generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None
        )
        assert list(answer.tokens) == generated[0, len(prompt) :].tolist()


def test_dynamic_scaling_equals_one_pass_of_transformers_within_the_original_context() -> None:
    hf = theirs(DYNAMIC)
    assert (ours(DYNAMIC, hf)(tokens(64)) - hf(tokens(64)).logits).abs().max() < 1e-5


def test_dynamic_scaling_is_that_of_transformers_token_by_token() -> None:
    """Beyond the original context transformers agrees with itself alone where it reads one token
    after the other; so do we, in one pass, and in decoding."""
    hf, sequence_1T = theirs(DYNAMIC), tokens(300)
    model = ours(DYNAMIC, hf)
    expected = decoded(hf, sequence_1T, 1)
    assert (model(sequence_1T) - expected).abs().max() < 1e-5
    plain = ours(replace(DYNAMIC, rope_scaling=None), hf)
    assert (plain(sequence_1T) - expected).abs().max() > 0.1, "the scaling matters"

    prompt = sequence_1T[0, :50].tolist()
    (answer,) = Engine(model, precision="fp32").generate(
        [prompt], Sampling(temperature=0, max_tokens=150)
    )[0]
    generated = hf.generate(
        torch.tensor([prompt]), max_new_tokens=150, do_sample=False, eos_token_id=None
    )
    assert list(answer.tokens) == generated[0, 50:].tolist()


@pytest.mark.parametrize("shape", RELATIVES.values(), ids=RELATIVES)
def test_transformers_loads_what_we_write_and_we_what_it_writes(
    tmp_path: Path, shape: LlamaConfig
) -> None:
    model = ours(shape, theirs(shape))
    checkpoint.save(model, tmp_path / "ours")
    assert checkpoint.config_of(tmp_path / "ours") == shape
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    length = 64 if shape == DYNAMIC else LENGTH
    expected = model(tokens(length))
    assert (hf(tokens(length)).logits - expected).abs().max() < 1e-5

    hf.save_pretrained(tmp_path / "theirs")
    again = checkpoint.load(tmp_path / "theirs")
    assert again.config == shape
    assert torch.equal(again(tokens(length)), expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_relatives_of_other_names_are_read(tmp_path: Path, family: str) -> None:
    """What transformers itself writes of a Mistral and of a Qwen 2; keys that are absent have the
    values of their class."""
    shape = replace(QWEN if family == "qwen2" else PLAIN, rms_norm_eps=1e-6)
    hf = theirs(shape, model_type=family, bos_token_id=None, sliding_window=None)
    hf.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    model = checkpoint.load(tmp_path)
    assert model.config == replace(shape, bos_token_id=None)
    assert (model(tokens(LENGTH)) - hf(tokens(LENGTH)).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["wide heads", "yarn", "bias", "bias everywhere", "mixed"])
def test_scores_equal_transformers(tmp_path: Path, name: str) -> None:
    """A reward model on the trunk of a relative, its head left behind, tied or not."""
    shape = RELATIVES[name]
    checkpoint.save(ours(shape, theirs(shape)), tmp_path / "model")
    scorer = checkpoint.load_scorer(tmp_path / "model", seed=4)
    checkpoint.save(scorer, tmp_path / "scorer")
    hf, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "scorer", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = hf(tokens(LENGTH, 2)).logits[:, 0]
    lengths_B = torch.tensor([LENGTH, LENGTH])
    again = checkpoint.load_scorer(tmp_path / "scorer")
    assert again.config == shape
    assert (again(tokens(LENGTH, 2), lengths_B=lengths_B) - expected).abs().max() < 1e-5


TRANSFORMERS_4 = os.environ.get("LLAMA2_TRANSFORMERS4_PYTHON")
_PEER = """
import json, sys, torch, transformers
answers = {}
for folder in json.loads(sys.argv[1]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    ids = torch.tensor([json.loads(sys.argv[2])])
    with torch.no_grad():
        answers[folder] = model(ids[:, : 64 if "dynamic" in folder else None]).logits[0].tolist()
print(json.dumps(answers))
"""


@pytest.mark.skipif(TRANSFORMERS_4 is None, reason="LLAMA2_TRANSFORMERS4_PYTHON names no program")
def test_transformers_4_reads_what_we_write(tmp_path: Path) -> None:
    models = {}
    for number, (name, shape) in enumerate(RELATIVES.items()):
        folder = tmp_path / f"{number}-{name.replace(', ', '-').replace(' ', '-')}"
        model = ours(shape, theirs(shape))
        checkpoint.save(model, folder)
        models[str(folder)] = model

    ids = tokens(LENGTH)
    told = subprocess.run(
        [str(TRANSFORMERS_4), "-c", _PEER, json.dumps(list(models)), json.dumps(ids[0].tolist())],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )
    for folder, logits in json.loads(told.stdout.splitlines()[-1]).items():
        expected = torch.tensor(logits)
        found = models[folder](ids)[0, : len(expected)]
        assert (found - expected).abs().max() < 2e-5, folder
