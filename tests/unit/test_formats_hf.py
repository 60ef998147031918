"""Hugging Face directories: read in all their forms, written a tensor at a time, refused in one
line if damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import SHAPE, model_of, same, scorer_of, source_of, state
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import hf, safetensors_file, stored_model, torch_legacy, torch_zip
from llama2.formats.hf_config import make_config_json
from llama2.formats.hf_directory import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    PICKLED,
    PICKLED_INDEX,
    WEIGHTS,
    list_shapes,
)
from llama2.formats.stored_model import StoredTensor, observe, read_ahead
from llama2.model.llama import LlamaConfig
from llama2.model.tensors import HEAD

TINY = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TIED = replace(TINY, tie_word_embeddings=True)
TABLE, NORM, GATE = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.mlp.gate_proj.weight",
)
State = dict[str, Tensor]


def weights(config: LlamaConfig = TINY, dtype: torch.dtype = torch.float32) -> State:
    return dict(model_of(config, dtype).state_dict())


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def pickled(
    directory: Path,
    tensors: State,
    config: LlamaConfig = TINY,
    *,
    shards: int = 1,
    old: bool = False,
) -> Path:
    """A directory as transformers wrote it for years."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(make_config_json(config)))
    names = list(tensors)
    parts = [names[part::shards] for part in range(shards)]
    files = (
        [PICKLED]
        if shards == 1
        else [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    )

    for file, part in zip(files, parts):
        torch.save(
            OrderedDict((name, tensors[name]) for name in part),
            directory / file,
            _use_new_zipfile_serialization=not old,
        )

    if shards > 1:
        where = {name: file for file, part in zip(files, parts) for name in part}
        (directory / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return directory


# --- what is written ---
@pytest.mark.parametrize("shard_bytes", [1 << 30, 3_000])
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_what_is_written_is_read_bit_for_bit(
    tmp_path: Path, config: LlamaConfig, shard_bytes: int
) -> None:
    model = model_of(config, torch.bfloat16)
    hf.write(source_of(model, tmp_path), tmp_path / "model", shard_bytes=shard_bytes)
    again = hf.read(tmp_path / "model")
    assert (again.config, again.scorer, again.tokenizer) == (config, False, None)
    assert same(state(again), dict(model.state_dict()))
    assert (tmp_path / "model" / INDEX).exists() == (shard_bytes == 3_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_shapes_expected_are_those_of_the_models() -> None:
    for config in (TINY, TIED, replace(TINY, num_key_value_heads=4)):
        for model, scorer in ((model_of(config), False), (scorer_of(config), True)):
            found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            assert list(list_shapes(config, scorer=scorer).items()) == list(found.items())


def test_a_reward_model_is_one_when_it_is_read_again(tmp_path: Path) -> None:
    scorer = scorer_of(TINY)
    hf.write(source_of(scorer, tmp_path), tmp_path / "model")
    again = hf.read(tmp_path / "model")
    assert again.scorer
    assert same(state(again), dict(scorer.state_dict()))


def test_the_file_is_one_that_safetensors_itself_reads_and_could_map(tmp_path: Path) -> None:
    mixed = {
        "one": torch.randn(3).bfloat16(),
        "two": torch.randn(5, 2),
        "three": torch.randn(7).half(),
        "four": torch.randn(1).double(),
        "five": torch.empty(0, 4),
    }
    digest = safetensors_file.write(
        tmp_path / "f",
        {
            name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.clone, name)
            for name, tensor in mixed.items()
        },
    )
    assert same(
        load_file(tmp_path / "f"), {name: mixed[name] for name in load_file(tmp_path / "f")}
    )
    content = (tmp_path / "f").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])

    for name, tensor in mixed.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name
        assert torch.equal(safetensors_file.list_tensors(tmp_path / "f")[name].read(), tensor)


def test_checksums_are_those_of_all_files_the_tokenizer_included(tmp_path: Path) -> None:
    def beside(directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(b"pieces")

    hf.write(
        source_of(model_of(TINY), tmp_path), tmp_path / "model", shard_bytes=3_000, beside=beside
    )
    sums = json.loads((tmp_path / "model" / CHECKSUMS).read_text())
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert sums.keys() == files - {CHECKSUMS}
    assert {"tokenizer.model", CONFIG, INDEX} < sums.keys()

    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest() == digest

    assert str(hf.read(tmp_path / "model").tokenizer) == str(tmp_path / "model" / "tokenizer.model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_as_pytorch_converts_them(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 100)  # a tensor takes several
    model = model_of(TINY)
    hf.write(source_of(model, tmp_path), tmp_path / "model", dtype=dtype)
    assert same(
        state(hf.read(tmp_path / "model")),
        {name: tensor.to(dtype) for name, tensor in model.state_dict().items()},
    )
    assert json.loads((tmp_path / "model" / CONFIG).read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")


def test_as_much_is_in_memory_as_the_largest_tensor_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "SMALL", 0)
    model = model_of(TINY)
    held, most = 0, 0
    largest = max(tensor.nbytes for tensor in model.state_dict().values())

    def read(name: str, tensor: Tensor) -> Tensor:
        nonlocal held, most
        copy = tensor.clone()
        held, most = held + copy.nbytes, max(most, held + copy.nbytes)
        weakref.finalize(copy, gone, copy.nbytes)

        return copy

    def gone(size: int) -> None:
        nonlocal held
        held -= size

    hf.write(source_of(model, tmp_path, read=read), tmp_path / "model")
    assert held == 0
    assert most == largest  # and not more, though small tensors are read ahead


def test_what_lies_in_order_passes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 100)
    hf.write(source_of(model_of(TINY), tmp_path), tmp_path / "model")
    seen: list[int] = []
    hf.write(
        observe(hf.read(tmp_path / "model"), lambda stored, tensor: seen.append(tensor.numel())),
        tmp_path / "again",
        dtype=torch.bfloat16,
    )
    assert max(seen) == 100
    assert sum(seen) == TINY.parameters()
    assert same(state(hf.read(tmp_path / "again")), weights(dtype=torch.bfloat16))


def test_a_tensor_that_is_read_otherwise_is_not_taken_in_parts(tmp_path: Path) -> None:
    hf.write(source_of(model_of(TINY), tmp_path), tmp_path / "model")
    found = hf.read(tmp_path / "model")
    doubled = {
        name: replace(stored, read=lambda stored=stored: stored.read() * 2)
        for name, stored in found.tensors.items()
    }
    hf.write(replace(found, tensors=doubled), tmp_path / "again")
    assert same(
        state(hf.read(tmp_path / "again")), {name: tensor * 2 for name, tensor in weights().items()}
    )


def test_reading_ahead_keeps_the_order_and_raises_where_it_failed() -> None:
    def stored(number: int) -> StoredTensor:
        def read() -> Tensor:
            if number == 5:
                raise UserError("the fifth")

            return torch.tensor([number])

        return StoredTensor((1,), torch.int64, read, str(number))

    found: list[float] = []
    tensors = read_ahead(
        [StoredTensor((2,), torch.int64, lambda: torch.zeros(2), "large"), *map(stored, range(8))]
    )
    with pytest.raises(UserError, match="the fifth"):
        found.extend(tensor[0].item() for tensor in tensors)

    assert found == [0, 0, 1, 2, 3, 4]


def fails(name: str, tensor: Tensor) -> Tensor:
    if name == NORM:
        raise OSError(28, "No space left on device")

    return tensor.clone()


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "model"
    if exists:
        hf.write(source_of(model_of(TINY), tmp_path), target)
        (target / "notes").write_text("mine")

    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="no space left"):
        hf.write(source_of(model_of(TINY, seed=1), tmp_path, read=fails), target, shard_bytes=3_000)

    assert snapshot(tmp_path) == before
    assert target.exists() == exists


def test_a_number_too_large_for_the_precision_is_named(tmp_path: Path) -> None:
    model = model_of(TINY)
    with torch.no_grad():
        model.state_dict()[GATE][3, 3] = 1e5

    with pytest.raises(UserError, match=rf"{re.escape(GATE)}: a number is too large for float16"):
        hf.write(source_of(model, tmp_path), tmp_path / "model", dtype=torch.float16)

    assert not list(tmp_path.iterdir())


# --- what is read ---
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read_bit_for_bit(tmp_path: Path, shards: int, old: bool) -> None:
    tensors = weights(dtype=torch.float16)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    found = hf.read(pickled(tmp_path / "m", tensors | extra, shards=shards, old=old))
    assert same(state(found), tensors)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_pickled_tensors_that_share_or_turn_their_storage(tmp_path: Path, old: bool) -> None:
    tensors = weights()
    everything = torch.randn(2, 24, 16)
    tensors[GATE], tensors["model.layers.0.mlp.up_proj.weight"] = everything[1], everything[0]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.randn(24, 16).T
    tensors[HEAD] = tensors[TABLE] = torch.nn.Parameter(tensors[HEAD])
    assert same(
        state(hf.read(pickled(tmp_path / "m", tensors, old=old))),
        {n: t.detach() for n, t in tensors.items()},
    )
    tied = hf.read(pickled(tmp_path / "tied", tensors, TIED, old=old))
    assert HEAD not in tied.tensors


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "m", weights())
    save_file(weights(dtype=torch.bfloat16), directory / WEIGHTS)
    assert {stored.dtype for stored in hf.read(directory).tensors.values()} == {torch.bfloat16}


def test_early_conversions_spelt_the_architecture_otherwise(tmp_path: Path) -> None:
    edit(
        pickled(tmp_path / "m", weights()), architectures=["LLaMAForCausalLM"], eos_token_id=[2, 3]
    )
    found = hf.read(tmp_path / "m")
    assert (found.scorer, found.config.eos_token_id) == (False, (2, 3))


def test_only_the_tensor_asked_for_is_read(tmp_path: Path) -> None:
    """Damage that a checksum would show is found in the tensor that has it, and nowhere else."""
    file = pickled(tmp_path / "m", weights()) / PICKLED
    content = bytearray(file.read_bytes())
    place = content.find(weights()[GATE].numpy().tobytes())
    content[place + 5] ^= 1
    file.write_bytes(content)

    for name, stored in hf.read(tmp_path / "m").tensors.items():
        if name == GATE:
            with pytest.raises(UserError, match=f"{re.escape(GATE)}.*do not match their checksum"):
                stored.read()
        else:
            assert torch.equal(stored.read(), weights()[name])


# --- what is refused ---
class Bomb:
    """Pickles as a call that makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("hidden", ["as a value", "as a key", "around all", "in a parameter"])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    tmp_path: Path, old: bool, hidden: str
) -> None:
    mark = tmp_path / "it ran"
    tensors: Any = weights()
    if hidden == "as a value":
        tensors["bomb"] = Bomb(mark)
    elif hidden == "as a key":
        tensors[Bomb(mark)] = torch.ones(1)
    elif hidden == "around all":
        tensors = [Bomb(mark), tensors]
    else:
        tensors[NORM] = torch.nn.Parameter(tensors[NORM])
        tensors[NORM].extra = Bomb(mark)

    directory = pickled(tmp_path / "m", weights())
    torch.save(tensors, directory / PICKLED, _use_new_zipfile_serialization=not old)
    with pytest.raises(
        UserError, match=r"refused, for reading it would call '(posix\.mkdir|torch\._utils\.\w+)'"
    ):
        hf.read(directory)

    assert not mark.exists()
    if hidden != "in a parameter":
        torch.load(directory / PICKLED, weights_only=False)  # the bomb is real
        assert mark.exists()


def test_code_in_the_small_pickles_of_an_old_file_does_not_run_either(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    directory = pickled(tmp_path / "m", weights(), old=True)
    begin = (directory / PICKLED).read_bytes()[: len(torch_legacy._BEGIN)]
    (directory / PICKLED).write_bytes(begin + pickle.dumps(Bomb(mark), protocol=2))

    with pytest.raises(UserError, match=re.escape(str(directory / PICKLED))):
        hf.read(directory)

    assert not mark.exists()


def test_a_pickle_does_nothing_with_what_it_may_name(tmp_path: Path) -> None:
    """The few names that are allowed give it no way to others: no attribute, no state that is set,
    no module."""
    for line in (
        b"ctorch\nload\n(S'x'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch._utils\n__builtins__\n.",
        b"ccollections\nabc\n.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x82\x01.",
    ):
        with pytest.raises(UserError):
            torch_zip.read_views(tmp_path, torch_zip.TensorUnpickler(io.BytesIO(line)))


@pytest.mark.parametrize("form", ["safetensors", "zip", "before 1.6"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    small = {"a": torch.randn(3, 4), "b": torch.randn(5).half()}
    file = tmp_path / "f"
    if form == "safetensors":
        save_file(small, file)
    else:
        torch.save(small, file, _use_new_zipfile_serialization=form == "zip")

    reader = {"safetensors": safetensors_file, "zip": torch_zip, "before 1.6": torch_legacy}[
        form
    ].list_tensors
    assert same({name: stored.read() for name, stored in reader(file).items()}, small)
    content = file.read_bytes()

    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=re.escape(str(file))):
            reader(file)


@pytest.mark.parametrize("form", ["safetensors", "zip", "before 1.6"])
def test_a_flipped_bit_is_refused_or_does_no_harm(tmp_path: Path, form: str) -> None:
    small = {"a": torch.randn(3, 4), "b": torch.randn(5).half()}
    file = tmp_path / "f"
    if form == "safetensors":
        save_file(small, file)
    else:
        torch.save(small, file, _use_new_zipfile_serialization=form == "zip")

    reader = {"safetensors": safetensors_file, "zip": torch_zip, "before 1.6": torch_legacy}[
        form
    ].list_tensors
    content, chance = file.read_bytes(), random.Random(0)
    for _ in range(800):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        found: State = {}

        with suppress(UserError):
            found = {name: stored.read() for name, stored in reader(file).items()}

        if form == "zip" and found.keys() == small.keys():
            shapes = all(found[name].shape == small[name].shape for name in small)
            assert not shapes or same(found, small)


def edit(directory: Path, **changes: object) -> None:
    path = directory / CONFIG
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "delete"}))


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edited(directory: Path) -> None:
        index = json.loads((directory / PICKLED_INDEX).read_text())
        change(index["weight_map"])
        (directory / PICKLED_INDEX).write_text(json.dumps(index))

    return edited


def resave(change: Callable[[State], object]) -> Callable[[Path], None]:
    def saved(directory: Path) -> None:
        file = sorted(directory.glob("*.bin"))[0]
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)

    return saved


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "mistral": (
        lambda d: edit(
            d, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16
        ),
        "sliding_window is 16",
    ),
    "mixtral": (lambda d: edit(d, model_type="mixtral"), "is 'mixtral'"),
    "a model without a head": (
        lambda d: edit(d, architectures=["LlamaModel"]),
        r"architectures is \['LlamaModel'\]",
    ),
    "scaled positions": (
        lambda d: edit(d, rope_scaling={"rope_type": "llama3"}),
        r"rope_scaling\.rope_type is 'llama3'",
    ),
    "positions no object": (lambda d: edit(d, rope_scaling=[1]), r"rope_scaling is \[1\]"),
    "quantized": (
        lambda d: edit(d, quantization_config={"quant_method": "gptq"}),
        "quant_method 'gptq'",
    ),
    "no whole number": (lambda d: edit(d, hidden_size=16.5), r"hidden_size is 16\.5"),
    "no number": (lambda d: edit(d, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "no truth": (lambda d: edit(d, tie_word_embeddings=1), "tie_word_embeddings is 1"),
    "null": (lambda d: edit(d, vocab_size=None), "key 'vocab_size' is missing"),
    "no ends": (lambda d: edit(d, eos_token_id=[]), r"eos_token_id is \[\]"),
    "too many layers": (
        lambda d: edit(d, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "too wide": (lambda d: edit(d, hidden_size=1 << 62), "hidden_size is 4611686018427387904"),
    "another vocabulary": (
        lambda d: edit(d, vocab_size=41),
        r"2 wrongly shaped: model\.embed_tokens\.weight \[40, 16\] instead of \[41, 16\], lm_head",
    ),
    "missing shard": (
        lambda d: sorted(d.glob("*.bin"))[1].unlink(),
        r"00002-of-00002\.bin: missing, though pytorch_m",
    ),
    "index elsewhere": (
        edit_index(lambda m: m.update({NORM: "../x.bin"})),
        r"the file of 'model\.norm\.weight' is '",
    ),
    "index of lists": (
        edit_index(lambda m: m.update({NORM: ["x"]})),
        r"the file of 'model\.norm\.weight' is \['x'\]",
    ),
    "missing tensor": (resave(lambda s: s.pop(TABLE)), r"1 missing: model\.embed_tokens\.weight"),
    "twice": (
        resave(lambda s: s.update({GATE: torch.ones(24, 16)})),
        r"gate_proj\.weight' is in another file as well",
    ),
    "integers": (
        resave(lambda s: s.update({TABLE: s[TABLE].char()})),
        r"embed_tokens\.weight' is torch\.int8",
    ),
    "no tensor": (
        resave(lambda s: s.update({NORM: "text"})),
        r"'model\.norm\.weight' is no tensor",
    ),
    "a list": (
        lambda d: torch.save([torch.ones(1)], d / "pytorch_model-00001-of-00002.bin"),
        "it holds a list",
    ),
    "no weights": (
        lambda d: [path.unlink() for path in d.glob("pytorch_model*")],
        r"neither model\.safetensors nor",
    ),
    "empty file": (
        lambda d: (d / "pytorch_model-00001-of-00002.bin").write_bytes(b""),
        "truncated",
    ),
    "nested": (lambda d: (d / CONFIG).write_text("[" * 100_000), "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_that_names_it(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    directory = pickled(tmp_path / "m", weights(), shards=2)
    damage(directory)

    with pytest.raises(UserError, match=message) as raised:
        hf.read(directory)

    assert str(directory) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.cure


@pytest.mark.parametrize("name", ["/dev/zero", "../base/config.json", "/etc/shadow", "a/b", ".."])
def test_checksums_name_plain_files_of_their_own_directory(tmp_path: Path, name: str) -> None:
    hf.write(source_of(model_of(SHAPE), tmp_path), tmp_path / "model")
    (tmp_path / "model" / "checksums.json").write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(
        UserError, match=rf"checksums\.json: it names '{name}', which is no file of this directory"
    ):
        hf.read(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checksums.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused_at_once(
    tmp_path: Path, name: str
) -> None:
    hf.write(source_of(model_of(SHAPE), tmp_path), tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(
        UserError,
        match=rf"{name}: this is a pipe, a file was expected; write its content to a file",
    ):
        hf.read(tmp_path / "model")

    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{name}: this is a device, a file was expected"):
        hf.read(tmp_path / "model")
