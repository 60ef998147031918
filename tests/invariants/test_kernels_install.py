"""Kernels take the place of what is exactly the network's own; whatever wraps, hooks or replaces a
module takes effect, in values and gradients, whether it came before the kernels or after them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.kernels import build, fused, install, is_known
from llama2.model.cache import KVCache
from llama2.model.llama import Attention, FeedForward, Llama, LlamaConfig, RMSNorm
from llama2.model.scorer import Scorer

SHAPE = LlamaConfig(64, 32, 48, 2, 4, 2, 64)
TIED = LlamaConfig(64, 32, 48, 2, 4, 2, 64, tie_word_embeddings=True)
PROJECTIONS = [
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
]
PLACES = [
    *PROJECTIONS,
    "model.layers.1.input_layernorm",
    "model.layers.0.post_attention_layernorm",
    "model.norm",
    "model.embed_tokens",
    "lm_head",
]
BLOCKS = ["model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.0", "model"]
Change = Callable[[nn.Module, str], None]


class Adapter(nn.Module):
    """A low-rank term beside a module; it has no `weight` of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.base = base
        self.down = nn.Parameter(torch.full((4, inputs), 0.3))
        self.up = nn.Parameter(torch.linspace(-1, 1, 4 * outputs).view(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self.base(x) + self.down.T[:, :1].T.sum() * self.up.sum(1)[x][..., None]

        return self.base(x) + (x @ self.down.T) @ self.up.T


class ScaledNorm(nn.Module):
    """A norm around a norm."""

    def __init__(self, base: RMSNorm) -> None:
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.full((), 1.5))

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stream, normed = self.base(x, update)
        return stream, normed * self.gain


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parent(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    owner, _, name = place.rpartition(".")
    return model.get_submodule(owner), name


def wrap(model: nn.Module, place: str) -> None:
    """Put an adapter in the place of a module."""
    module, (parent, name) = model.get_submodule(place), _parent(model, place)
    setattr(parent, name, ScaledNorm(module) if isinstance(module, RMSNorm) else Adapter(module))


def _scaled(output: object) -> object:
    """1.5 times a tensor, or the last of several."""
    if isinstance(output, tuple):
        return (*output[:-1], _scaled(output[-1]))

    return output * 1.5


def hook(model: nn.Module, place: str) -> None:
    """A forward hook that changes the output."""
    model.get_submodule(place).register_forward_hook(lambda _, __, output: _scaled(output))


def pre_hook(model: nn.Module, place: str) -> None:
    """A forward pre-hook that changes the input."""

    def other(_: nn.Module, inputs: tuple) -> tuple:
        first = inputs[0].roll(1, 0) if inputs[0].dtype == torch.long else inputs[0] * 1.5
        return (first, *inputs[1:])

    model.get_submodule(place).register_forward_pre_hook(other)


def backward_hook(model: nn.Module, place: str) -> None:
    """A backward hook that changes the gradient."""
    model.get_submodule(place).register_full_backward_hook(
        lambda _, inputs, __: tuple(None if each is None else each * 3 for each in inputs)
    )


def parametrization(model: nn.Module, place: str) -> None:
    """Another weight than the one that is trained."""
    parametrize.register_parametrization(model.get_submodule(place), "weight", Doubled())


def own_forward(model: nn.Module, place: str) -> None:
    """A `forward` put on the module itself."""
    module = model.get_submodule(place)
    plain = type(module).forward
    module.forward = lambda *inputs: _scaled(plain(module, *inputs))


def subclass(model: nn.Module, place: str) -> None:
    """A module of a class derived from its own."""
    module = model.get_submodule(place)
    base = type(module)
    base = {"FusedRMSNorm": RMSNorm}.get(base.__name__, base)
    module.__class__ = type(
        "Other",
        (base,),
        {"forward": lambda self, *inputs: _scaled(base.forward(self, *inputs))},
    )


CHANGES = [wrap, hook, pre_hook, own_forward, subclass]


@pytest.fixture(params=["native", "plain"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With our kernels and without them."""
    if request.param == "plain":
        monkeypatch.setenv("LLAMA2_NATIVE", "0")

    build.forget()
    yield
    monkeypatch.undo()
    build.forget()


def network(shape: LlamaConfig = SHAPE) -> Llama:
    """Weights ten times the usual, so that every change shows."""
    model = Llama(shape, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)

    return model


def pair(change: Change, place: str, when: str, shape: LlamaConfig = SHAPE) -> tuple[Llama, Llama]:
    """A network with kernels and one without, changed alike."""
    plain, ours = network(shape), network(shape)
    change(plain, place)
    if when == "before":
        change(ours, place)

    install(ours)
    if when == "after":
        change(ours, place)

    return ours, plain


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(4))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def assert_near(ours: Tensor, plain: Tensor) -> None:
    assert (ours - plain).norm() <= 1e-4 * plain.norm().clamp(min=1e-3)


def compare(ours: nn.Module, plain: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """The same values and the same gradients of every parameter."""
    results = [run(model) for model in (ours, plain)]
    assert_near(*(each.detach() for each in results))
    weights = torch.linspace(-1, 1, results[0].numel()).view_as(results[0])
    mine, theirs = (
        gradients(model, (result * weights).sum()) for model, result in zip((ours, plain), results)
    )
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_near(mine[name], gradient)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_takes_effect_in_training(
    compiler: None, change: Change, place: str, when: str
) -> None:
    ours, plain = pair(change, place, when)
    batch, documents = tokens(2, 24), torch.arange(24).expand(2, -1) // 9
    with torch.no_grad():
        untouched = network()(batch)
        assert (ours(batch) - untouched).norm() > 0.01 * untouched.norm()

    compare(ours, plain, lambda model: model(batch))
    compare(ours, plain, lambda model: model(batch, targets_BT=batch.roll(-1, 1)))
    compare(
        ours,
        plain,
        lambda model: model(batch, targets_BT=batch.roll(-1, 1), documents_BT=documents),
    )


@pytest.mark.parametrize("change", [backward_hook, parametrization])
@pytest.mark.parametrize("place", [*PROJECTIONS, "model.norm", "lm_head"])
def test_gradients_and_weights_may_be_changed_too(
    compiler: None, change: Change, place: str
) -> None:
    if change is backward_hook and place == "model.norm":
        pytest.skip("what it returns first is a view")

    ours, plain = pair(change, place, "after")
    batch = tokens(2, 24)
    compare(ours, plain, lambda model: model(batch, targets_BT=batch.roll(-1, 1)))


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward])
@pytest.mark.parametrize("place", BLOCKS)
def test_blocks_may_be_hooked(compiler: None, change: Change, place: str) -> None:
    ours, plain = pair(change, place, "after")
    compare(ours, plain, lambda model: model(tokens(2, 24)))


@torch.no_grad()
def cached(model: Llama) -> Tensor:
    """Logits of a prompt of six tokens, and of four more read one by one."""
    batch = tokens(2, 10)
    cache = KVCache(2, 2, 2, 32, 8, dtype=torch.float32, device=torch.device("cpu"))
    cache.prefill(torch.arange(2), 6)
    logits = [model(batch[:, :6], positions_BT=torch.arange(6)[None], cache=cache)]

    for position in range(6, 10):
        positions_B = torch.full((2,), position)
        cache.decode(positions_B, position + 1)
        one = model(
            batch[:, position : position + 1], positions_BT=positions_B[:, None], cache=cache
        )
        logits.append(one)

    return torch.cat(logits, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_takes_effect_behind_a_cache(
    compiler: None, change: Change, place: str
) -> None:
    ours, plain = pair(change, place, "after")
    found = cached(ours)
    assert_near(found, cached(plain))
    if change is not pre_hook or place != "model.embed_tokens":  # it exchanges the rows
        with torch.no_grad():
            assert_near(found, plain(tokens(2, 10)))


def test_a_gradient_goes_through_a_cache(compiler: None) -> None:
    def read(model: nn.Module) -> Tensor:
        cache = KVCache(2, 2, 2, 32, 8, dtype=torch.float32, device=torch.device("cpu"))
        cache.prefill(torch.arange(2), 6)
        # what is written to a cache is written in place, so that only the queries learn
        model.requires_grad_(False)
        model.get_submodule("model.layers.1.mlp").requires_grad_(True)
        return model(tokens(2, 6), positions_BT=torch.arange(6)[None], cache=cache)

    compare(install(network()), network(), read)


PROMPTS = [[1, 5, 9, 13], [1, 40], [1, 5, 9, 2, 2, 7]]


def assert_samples(engine: Engine, plain: Llama) -> None:
    """Greedy answers are those of the plain network, with its log-probabilities."""
    for [answer] in engine.generate(PROMPTS, Sampling(temperature=0, max_tokens=6)):
        row = torch.tensor([[*answer.prompt, *answer.tokens]])
        with torch.no_grad():
            logp_TV = plain(row).log_softmax(-1)[0, len(answer.prompt) - 1 : -1]

        assert answer.tokens == tuple(logp_TV.argmax(-1).tolist())
        assert_near(torch.tensor(answer.logprobs), logp_TV.amax(-1))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_takes_effect_in_samples(
    compiler: None, change: Change, place: str, frozen: bool
) -> None:
    """Also where the engine has already packed the weights of the unchanged model."""
    if change is pre_hook and place == "model.embed_tokens":
        pytest.skip("it exchanges the rows of a batch")

    ours, plain = network(), network()
    ours.requires_grad_(not frozen)
    engine = Engine(ours, precision="fp32")
    assert_samples(engine, plain)
    for model in (ours, plain):
        change(model, place)

    assert_samples(engine, plain)


@pytest.mark.parametrize("change", [wrap, hook, subclass])
@pytest.mark.parametrize("place", ["model.layers.1.self_attn.q_proj", "model.norm", "lm_head"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_engine_that_holds_a_copy_sees_changes(
    compiler: None, change: Change, place: str, precision: str
) -> None:
    """The copy in another precision has the wrappers and hooks of the model."""
    ours, changed = network().requires_grad_(False), network()
    engine = Engine(ours, precision=precision)
    sampling = Sampling(temperature=0, max_tokens=6)
    before = engine.generate(PROMPTS, sampling)
    for model in (ours, changed):
        change(model, place)

    after = engine.generate(PROMPTS, sampling)
    fresh = Engine(changed.requires_grad_(False), precision=precision).generate(PROMPTS, sampling)
    assert after == fresh
    assert after != before
    ours.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(-1)
    assert engine.generate(PROMPTS, sampling) != after, "weights are read anew"


def test_a_model_of_another_class_is_sampled_as_it_is(compiler: None) -> None:
    class Muted(Llama):
        """The first ids are never drawn."""

        def logits(self, hidden_BTD: Tensor) -> Tensor:
            return super().logits(hidden_BTD).index_fill(-1, torch.arange(40), -1e4)

    model = Muted(SHAPE, 3).requires_grad_(False)
    for precision in ("fp32", "bf16"):
        answers = Engine(model, precision=precision).generate(
            PROMPTS, Sampling(max_tokens=6, seed=1)
        )
        assert all(token >= 40 for [answer] in answers for token in answer.tokens)


@pytest.mark.parametrize("change", [wrap, hook, pre_hook, own_forward])
def test_the_head_of_a_reward_model_is_called(compiler: None, change: Change) -> None:
    ours, plain = install(Scorer(SHAPE, 3)), Scorer(SHAPE, 3)
    for model in (ours, plain):
        change(model, "score")

    compare(ours, plain, lambda model: model(tokens(2, 24)))
    lengths = torch.tensor([5, 20])
    compare(ours, plain, lambda model: model(tokens(2, 24), lengths_B=lengths))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("change", [None, hook, wrap])
def test_likelihoods_are_those_of_the_logits(
    compiler: None, change: Change | None, place: str, entropy: bool
) -> None:
    model, batch = install(network()), tokens(2, 24)
    if change:
        change(model, place)

    logp_BTV = model(batch).log_softmax(-1)
    result = model(batch, targets_BT=batch, entropy=entropy)
    if entropy:
        assert_near(result[1], torch.distributions.Categorical(logits=logp_BTV).entropy())
        assert not result[1].requires_grad

    assert_near(result[0] if entropy else result, logp_BTV.gather(2, batch[..., None])[..., 0])


@pytest.mark.parametrize("change", [hook, pre_hook])
def test_hooks_of_tied_embeddings_take_effect(compiler: None, change: Change) -> None:
    ours, plain = pair(change, "model.embed_tokens", "after", TIED)
    compare(ours, plain, lambda model: model(tokens(2, 24), targets_BT=tokens(2, 24)))


def test_a_hook_on_every_module_takes_effect(compiler: None) -> None:
    model, calls = install(network()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, __: calls.append(module)
    )
    try:
        model(tokens(2, 8))
    finally:
        handle.remove()

    assert {id(model.get_submodule(place)) for place in PLACES} <= set(map(id, calls))


def test_without_changes_the_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none of these tests passes because nothing was installed."""
    if not fused.supports(torch.zeros(1)):
        pytest.skip("no compiler")

    used = []
    for name in ("normalise", "swiglu", "attention", "likelihood"):
        function = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda *given, name=name, f=function: used.append(name) or f(*given)
        )

    network()(tokens(2, 8), targets_BT=tokens(2, 8))
    assert not used
    install(network())(tokens(2, 8), targets_BT=tokens(2, 8))
    assert set(used) == {"normalise", "swiglu", "attention", "likelihood"}


def test_only_exactly_our_own_modules_are_replaced() -> None:
    class Mine(FeedForward):
        pass

    model = network()
    model.model.layers[0].mlp = Mine(SHAPE)
    before = {name: type(module) for name, module in model.named_modules()}
    assert install(model) is model
    after = {name: type(module) for name, module in model.named_modules()}
    changed = {before[name] for name in before if after[name] is not before[name]}
    assert Mine not in changed
    assert {Attention, FeedForward, RMSNorm} <= changed
    assert list(model.state_dict()) == list(network().state_dict())
    install(model)
    assert after == {name: type(module) for name, module in model.named_modules()}


def test_what_the_engine_packs_is_known_whole() -> None:
    assert is_known(install(network()))
    assert is_known(network())
    for place in PLACES:
        for change in CHANGES:
            model = install(network())
            change(model, place)
            assert not is_known(model), (change, place)


def test_an_installed_model_can_be_copied_and_pickled() -> None:
    model, batch = install(network()), tokens(2, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [
            type(module) for module in model.modules()
        ]
        assert torch.equal(twin(batch), model(batch))
        assert twin.model.norm.weight is not model.model.norm.weight


# the tracer's own doing
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# so is this
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_installed_model_can_be_compiled() -> None:
    ours, plain = install(network()), network()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    batch = tokens(2, 16)
    expected = gradients(plain, plain(batch, targets_BT=batch).sum())
    found = gradients(ours, compiled(batch, targets_BT=batch).sum())
    for name, gradient in expected.items():
        assert_near(found[name], gradient)


def test_a_compiled_model_calls_an_adapter() -> None:
    ours, plain = pair(wrap, "model.layers.1.self_attn.q_proj", "after")
    compiled, batch = torch.compile(ours, backend="aot_eager"), tokens(2, 16)
    assert_near(compiled(batch).detach(), plain(batch).detach())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_wrapper_takes_effect_where_activations_are_recomputed(
    compiler: None, checkpointing: bool
) -> None:
    ours, plain = pair(wrap, "model.layers.1.self_attn.q_proj", "after")
    ours.model.gradient_checkpointing = checkpointing
    batch = tokens(2, 24)
    compare(ours, plain, lambda model: model(batch, targets_BT=batch.roll(-1, 1)))
