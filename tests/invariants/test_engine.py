"""What must not change a sample: the cache, the batch, the slots, shared prefills, ranks (fp32)."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import transformers

from llama2.errors import UserError
from llama2.generate.engine import Engine
from llama2.generate.generator import Completion
from llama2.generate.model_runner import ModelRunner
from llama2.generate.sampling import Sampling
from llama2.generate.score import compute_logprobs
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.quantize import Bits

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PLAIN = Sampling(max_tokens=12, seed=7)


PRECISIONS = [
    "fp32",
    "bf16",
    "int8",
    pytest.param(
        "int4", marks=pytest.mark.skipif(find_spec("torchao") is None, reason="no torchao")
    ),
]


def make_model(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    model = Llama(config, seed)
    # sharper than at initialisation, so that a wrong cache shows in the tokens
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)

    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model()


def engine(model: Llama, slots: int = 64) -> Engine:
    return Engine(model, slots=slots, precision="fp32")


def prompts(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def assert_same(one: Sequence[Sequence[Completion]], other: Sequence[Sequence[Completion]]) -> None:
    flat, others = ([each for row in rows for each in row] for rows in (one, other))
    assert [(each.prompt, each.tokens, each.finish) for each in flat] == [
        (each.prompt, each.tokens, each.finish) for each in others
    ]
    for each, twin in zip(flat, others):
        assert each.logprobs == pytest.approx(twin.logprobs, abs=1e-5)


def test_cached_decoding_equals_the_full_forward_pass(model: Llama) -> None:
    for row in engine(model).generate(prompts(5), PLAIN):
        for each in row:
            tokens = torch.tensor([each.prompt + each.tokens])
            with torch.no_grad():
                full = model(tokens[:, :-1], targets_BT=tokens[:, 1:])[0]

            assert each.logprobs == pytest.approx(full[len(each.prompt) - 1 :].tolist(), abs=1e-5)


def test_bf16_is_as_near_to_fp32_as_the_trainer_is(model: Llama) -> None:
    """Weights rounded once (engine) or by autocast at each product (trainer): errors of one
    size."""
    results = [row[0] for row in Engine(model, precision="bf16").generate(prompts(40), PLAIN)]
    rows = [each.prompt + each.tokens for each in results]
    mine, errors = [torch.tensor(each.logprobs) for each in results], {}
    exact, trainer = (
        [
            torch.tensor(row[len(each.prompt) - 1 :])
            for each, row in zip(results, compute_logprobs(model, rows, precision))
        ]
        for precision in ("fp32", "bf16")
    )

    for name, one, other in (
        ("engine", mine, exact),
        ("trainer", trainer, exact),
        ("gap", mine, trainer),
    ):
        errors[name] = float((torch.cat(one) - torch.cat(other)).abs().mean())

    assert 0 < errors["engine"] < 2 * errors["trainer"]
    assert errors["gap"] < 2 * errors["trainer"]


def test_batched_equals_alone(model: Llama) -> None:
    batch = prompts(9)
    alone = [
        engine(model).generate([prompt], PLAIN, indices=[index])[0]
        for index, prompt in enumerate(batch)
    ]
    assert_same(engine(model).generate(batch, PLAIN), alone)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_refilled_slots_equal_slots_for_all(model: Llama, slots: int) -> None:
    sampling = replace(PLAIN, n=3, stop=tuple(range(3, 12)), temperature=1.5)
    batch = prompts(11)
    results = engine(model, 64).generate(batch, sampling)
    assert len({len(each.tokens) for row in results for each in row}) > 4, (
        "they should finish at different times"
    )
    assert_same(engine(model, slots).generate(batch, sampling), results)


def test_samples_that_share_a_prefill_equal_samples_that_do_not(model: Llama) -> None:
    batch = prompts(4)
    together = engine(model, 5).generate(batch, replace(PLAIN, n=6))
    for index, prompt in enumerate(batch):
        assert_same(
            engine(model, 1).generate([prompt], replace(PLAIN, n=6), indices=[index]),
            [together[index]],
        )

    assert len({each.tokens for each in together[0]}) == 6, "samples of one prompt differ"


def test_one_prefill_a_prompt(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = ModelRunner.prefill
    monkeypatch.setattr(
        ModelRunner,
        "prefill",
        lambda self, prompts: (read.append(len(prompts)), prefill(self, prompts))[1],
    )
    engine(model, 4).generate([*prompts(3), prompts(3)[0]], replace(PLAIN, n=10))
    assert sum(read) == 3, "three different prompts, forty samples, four slots"


def test_the_same_prompt_twice_gives_different_samples(model: Llama) -> None:
    one, two = engine(model).generate([[5, 6, 7]] * 2, PLAIN)
    assert one[0].tokens != two[0].tokens


def test_a_share_of_the_prompts_gets_the_samples_of_the_whole(model: Llama) -> None:
    batch = prompts(7)
    whole = engine(model).generate(batch, PLAIN)
    for rank in range(2):
        assert_same(
            engine(model).generate(batch[rank::2], PLAIN, indices=range(7)[rank::2]), whole[rank::2]
        )


def test_the_seed_decides(model: Llama) -> None:
    batch = prompts(3)
    first = engine(model).generate(batch, PLAIN)
    assert engine(model).generate(batch, PLAIN) == first
    assert engine(model).generate(batch, replace(PLAIN, seed=8)) != first


def test_an_engine_used_before_gives_the_same(model: Llama) -> None:
    used = engine(model, 4)
    used.generate(prompts(9, seed=3, longest=40), replace(PLAIN, max_tokens=20))
    assert_same(used.generate(prompts(6), PLAIN), engine(model, 4).generate(prompts(6), PLAIN))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy_equals_transformers(kv_heads: int) -> None:
    config = replace(CONFIG, num_key_value_heads=kv_heads)
    model = make_model(1, config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vars(config)))
    theirs.load_state_dict(model.state_dict())

    for (mine,) in engine(model, 3).generate(prompts(6), Sampling(temperature=0, max_tokens=16)):
        tokens = torch.tensor([mine.prompt])
        expected = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(mine.tokens) == expected[0, len(mine.prompt) :].tolist()


def test_stop_ids_end_a_sample_and_are_part_of_it(model: Llama) -> None:
    free = engine(model).generate(prompts(6), PLAIN)
    stops = (free[0][0].tokens[4], 1)
    finishes = []

    for (whole,), (cut,) in zip(
        free, engine(model).generate(prompts(6), replace(PLAIN, stop=stops))
    ):
        places = [place for place, token in enumerate(whole.tokens) if token in stops]
        length = places[0] + 1 if places else 12
        assert cut.tokens == whole.tokens[:length]
        assert cut.finish == ("stop" if places else "length")
        finishes.append(cut.finish)
        assert len(cut.logprobs) == length

    assert set(finishes) == {"stop", "length"}


def test_the_stream_is_the_first_sample(model: Llama) -> None:
    mine = engine(model)
    whole = mine.generate([[5, 6, 7]], PLAIN)[0][0]
    assert tuple(mine.stream([5, 6, 7], PLAIN)) == whole.tokens
    first, second = mine.stream([5, 6, 7], PLAIN), mine.stream([5, 6, 7], PLAIN)
    assert list(zip(first, second)) == [(token, token) for token in whole.tokens], (
        "open streams coexist"
    )
    stop = whole.tokens[3]
    cut = mine.generate([[5, 6, 7]], replace(PLAIN, stop=(stop,)))[0][0]
    assert tuple(mine.stream([5, 6, 7], replace(PLAIN, stop=(stop,)))) == cut.tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_changed_in_place_are_seen_at_once(precision: str) -> None:
    model, other = make_model(0), make_model(1)
    mine = Engine(model, precision=precision)  # type: ignore[arg-type]
    before = mine.generate(prompts(4), PLAIN)
    model.load_state_dict(other.state_dict())
    after = mine.generate(prompts(4), PLAIN)
    assert before != after
    assert after == Engine(other, precision=precision).generate(prompts(4), PLAIN)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_takes_the_weights_of_another_model(precision) -> None:
    model, other = make_model(3), make_model(4).requires_grad_(False)
    used = Engine(model.requires_grad_(False), precision=precision)
    before = used.generate(prompts(4), PLAIN)
    used.update(other)
    after = used.generate(prompts(4), PLAIN)
    assert after != before
    assert after == Engine(other, precision=precision).generate(prompts(4), PLAIN)

    with pytest.raises(ValueError, match="another shape"):
        used.update(make_model(config=replace(CONFIG, num_hidden_layers=1)))


def test_a_sample_that_reaches_the_context_ends_by_length(model: Llama) -> None:
    ((each,),) = engine(model).generate([[5] * 60], replace(PLAIN, max_tokens=100))
    assert (len(each.tokens), each.finish) == (4, "length")


def test_a_prompt_beyond_the_context_says_by_how_much(model: Llama) -> None:
    with pytest.raises(UserError, match="prompt 2 of 2 has 70 tokens, 7 more than"):
        engine(model).generate([[5], [5] * 70], PLAIN)

    with pytest.raises(UserError, match="64 tokens, 1 more than"):
        engine(model).generate([[5] * 64], PLAIN)

    with pytest.raises(UserError, match="is empty"):
        engine(model).generate([[]], PLAIN)

    with pytest.raises(UserError, match="tokenizer"):
        engine(model).generate([[96]], PLAIN)

    assert engine(model).generate([], PLAIN) == []


def test_damaged_weights_are_reported() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(UserError, match="not finite"):
        engine(model).generate(prompts(2), PLAIN)


def rounded_engine(model: Llama, bits: Bits, slots: int = 64) -> Engine:
    if bits == "int4":
        pytest.importorskip("torchao")

    return Engine(model, slots=slots, precision=bits)


@pytest.mark.parametrize(("bits", "least", "most"), [("int8", 24, 0.5), ("int4", 16, 3.0)])
def test_rounded_weights_stay_near(model: Llama, bits: Bits, least: int, most: float) -> None:
    exact = engine(model).generate(prompts(30), Sampling(temperature=0, max_tokens=1))
    rounded = rounded_engine(model, bits).generate(
        prompts(30), Sampling(temperature=0, max_tokens=1)
    )
    same = [one for (one,), (other,) in zip(exact, rounded) if one.tokens == other.tokens]
    assert len(same) >= least
    gaps = [
        abs(one.logprobs[0] - other.logprobs[0])
        for (one,), (other,) in zip(exact, rounded)
        if one.tokens == other.tokens
    ]
    assert 0 < max(gaps) < most


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_batched_equals_alone(model: Llama, bits: Bits) -> None:
    batch = prompts(13)
    alone = [
        rounded_engine(model, bits).generate([prompt], PLAIN, indices=[index])[0]
        for index, prompt in enumerate(batch)
    ]
    for slots in (4, 64):
        assert_same(rounded_engine(model, bits, slots).generate(batch, PLAIN), alone)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_cached_decoding_equals_the_full_forward_pass(model: Llama, bits: Bits) -> None:
    """Of the model that the engine serves, whose weights are bf16: within its own distance to
    products in fp32."""
    mine = rounded_engine(model, bits)
    results = [row[0] for row in mine.generate(prompts(40), PLAIN)]
    rows, served = [each.prompt + each.tokens for each in results], mine.refresh()
    full, exact = (
        torch.tensor(
            [
                value
                for each, row in zip(results, compute_logprobs(measured, rows, precision))
                for value in row[len(each.prompt) - 1 :]
            ]
        )
        for measured, precision in ((served, "bf16"), (deepcopy(served).float(), "fp32"))
    )
    own = torch.tensor([value for each in results for value in each.logprobs])
    error = (full - exact).abs().mean()
    assert 0 < error < 0.01
    assert (own - full).abs().mean() < 2 * error
    assert (own - full).abs().max() < 0.05
    assert (own - exact).abs().mean() < 2 * error


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fused_optimizer_is_noticed(precision) -> None:
    """It writes to weights without counting their versions up."""
    model = make_model(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    used = Engine(model, precision=precision)
    before = used.generate(prompts(4), PLAIN)

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    optimizer.step()
    after = used.generate(prompts(4), PLAIN)
    assert after != before
    assert_same(after, Engine(model, precision=precision).generate(prompts(4), PLAIN))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_changed_weights_are_seen(precision, frozen) -> None:
    model, other = make_model(3), make_model(4)
    model.requires_grad_(not frozen)
    used = Engine(model, precision=precision)
    before = used.generate(prompts(4), PLAIN)
    assert used.generate(prompts(4), PLAIN) == before

    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters()):
            own.copy_(new)

    after = used.generate(prompts(4), PLAIN)
    assert after != before
    assert_same(after, Engine(other, precision=precision).generate(prompts(4), PLAIN))
