"""Cases of other tools' checkpoints and tokenizers: what comes in is what its maker meant, or is
refused by name."""

from __future__ import annotations

import json
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checks import Work, is_refusal, refusal
from formats_gguf import cases as gguf_cases
from formats_peft import cases as peft_cases
from safetensors.torch import save_file
from service import ASK
from weights import as_theirs, ids, ours, tensors, theirs, whole

from llama2.records import Message
from llama2.tokenizer import Tokenizer, encode_prompt

if TYPE_CHECKING:
    from run import Bench, Got


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _configurations()
    yield from _ends()
    yield from _templates()
    yield from _directories()
    yield from _tokenizers()
    yield from gguf_cases()
    yield from peft_cases()


def hf(
    bench: Bench, name: str, changes: Mapping[str, Any] | None = None, spread: float = 0.2
) -> Path:
    """A Hugging Face directory of the inputs, with weights."""
    tag = zlib.crc32(json.dumps([changes, spread]).encode())
    return whole(bench, bench.inputs / "formats" / "hf" / name, f"{name}-{tag}", changes, spread)


def bring(bench: Bench, place: Path | str, *more: str) -> Got:
    return bench.llama2("import", str(place), "--out", "OUT", *more)


def either(*works: Work) -> Work:
    """One of several outcomes is enough; what the last one got is printed if none is right."""

    def work(bench: Bench) -> tuple[bool, str]:
        got = ""
        for each in works:
            right, got = each(bench)
            if right:
                return True, got

        return False, got

    return work


# --- config.json ---
def _configurations() -> Iterator[tuple[str, str, Work]]:
    def same(name: str, changes: Mapping[str, Any] | None = None, spread: float = 0.2) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = hf(bench, name, changes, spread)
            return as_theirs(bring(bench, place), place)

        return work

    def refused(name: str, pattern: str, changes: Mapping[str, Any] | None = None) -> Work:
        return lambda bench: refusal(bring(bench, hf(bench, name, changes)), pattern)

    def given(name: str, pattern: str) -> Work:
        """A configuration that lies there alone, read as transformers reads it or refused."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = whole(bench, bench.inputs / "formats" / "config" / name, name)
            got = bring(bench, place)
            return (True, got.short()) if is_refusal(got, pattern) else as_theirs(got, place)

        return work

    yield (
        "config: rms_norm_eps missing",
        "transformers' logits, or refused by name",
        either(same("noeps", spread=0.002), refused("noeps", "rms_norm_eps")),
    )
    yield (
        "config: rope_theta twice",
        "refused, or transformers' logits",
        either(refused("theta_conflict", "rope_theta"), same("theta_conflict")),
    )
    yield (
        "config: rope-theta-conflict",
        "refused, or transformers' logits",
        given("rope-theta-conflict", "rope_theta"),
    )
    yield (
        "config: rope_parameters-type-key",
        "refused, or transformers' logits",
        given("rope_parameters-type-key", "rope|linear"),
    )
    rope = {"rope_theta": 10000.0}

    for name, changes in {
        "rope_scaling linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_type linear": {"rope_parameters": {**rope, "rope_type": "linear", "factor": 4.0}},
        "type dynamic": {"rope_parameters": {**rope, "type": "dynamic", "factor": 2.0}},
        "both keys": {
            "rope_parameters": {**rope, "rope_type": "default", "type": "linear", "factor": 4.0}
        },
        "unknown rope_type": {"rope_parameters": {**rope, "rope_type": "spiral"}},
        "half rotary": {
            "rope_parameters": {**rope, "rope_type": "default", "partial_rotary_factor": 0.5}
        },
        "attention_bias": {"attention_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "head_dim": {"head_dim": 32},
    }.items():
        yield (
            f"config: {name}",
            "refused by name, or transformers' logits",
            either(
                refused("eoslist", "rope|rotary|bias|hidden_act|head_dim|_proj|linear", changes),
                same("eoslist", changes),
            ),
        )

    yield (
        "config: theta a string",
        "refused",
        refused("eoslist", "rope_theta", {"rope_theta": "10000"}),
    )
    yield (
        "config: linear, factor 1",
        "transformers' logits: nothing is scaled",
        same(
            "eoslist", {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_parameters": None}
        ),
    )
    yield (
        "config: old names of early conversions",
        "transformers' logits",
        same(
            "eoslist",
            {
                "max_sequence_length": 512,
                "architectures": ["LLaMAForCausalLM"],
                "pad_token_id": -1,
                "head_dim": None,
            },
        ),
    )
    yield (
        "config: theta whole",
        "transformers' logits",
        same("eoslist", {"rope_theta": 1000000, "rope_parameters": None}),
    )

    def context(bench: Bench) -> tuple[bool, str]:
        place = hf(bench, "eoslist", {"max_position_embeddings": None})
        got = bring(bench, place)
        found = got.json("config.json").get("max_position_embeddings")

        return found == 2048 or is_refusal(
            got, "max_position_embeddings"
        ), f"{got.short()} | {found}"

    yield (
        "config: max_position_embeddings missing",
        "2,048, as transformers, or refused by name",
        context,
    )
    for key, values in {
        "rope_theta": (0, -1, 1e-320, float("inf")),
        "rms_norm_eps": (0, -1, float("inf")),
        "bos_token_id": (-5, 10**9),
        "eos_token_id": (10**9, -1, [2, 10**9], [], "2", True),
    }.items():
        for value in values:
            changes = (
                {key: value}
                if key != "rope_theta"
                else {
                    "rope_theta": value,
                    "rope_parameters": {"rope_theta": value, "rope_type": "default"},
                }
            )
            yield f"config: {key} {value}", "refused by name", refused("eoslist", key, changes)


# --- where an answer ends ---
def _ends() -> Iterator[tuple[str, str, Work]]:
    def stops(
        name: str,
        tokens: tuple[int, ...],
        changes: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        pattern: str = "eos",
    ) -> Work:
        """Each of the ids ends an answer of the imported model, in the server and in the chat; or
        import refuses."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = hf(bench, name, changes)
            if generation:
                (place / "generation_config.json").write_text(json.dumps(generation), "utf-8")

            got = bring(bench, place)
            if is_refusal(got, pattern):
                return True, got.short()

            service = bench.served(got.out)
            if service.refusal:
                return bool(
                    re.search(pattern + "|template", service.refusal, re.IGNORECASE)
                ), service.refusal

            ended = []
            for token in tokens:
                answer = service.chat(max_tokens=40, logit_bias={str(token): 100}).json()
                ended.append(
                    (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"])
                )

            return set(ended) == {("stop", 1)}, f"{got.short()} | {ended}"

        return work

    yield "eos: a list", "each id ends an answer", stops("eoslist", (2, 5))
    yield (
        "eos: a list in generation_config alone",
        "each id ends an answer",
        stops("eoslist", (2, 5), {"eos_token_id": 2}, {"eos_token_id": [2, 5], "bos_token_id": 1}),
    )
    yield (
        "eos: one id in generation_config alone",
        "it ends an answer",
        stops("eoslist", (2, 7), {"eos_token_id": 2}, {"eos_token_id": 7, "bos_token_id": 1}),
    )
    yield (
        "eos: another id",
        "it ends an answer, or import refuses",
        stops("eoslist", (9,), {"eos_token_id": 9}),
    )
    yield (
        "eos: an added item",
        "it ends an answer, or what the model wants is refused by name",
        stops("chatml", (1024,)),
    )
    yield (
        "bos: another id",
        "refused by name",
        lambda bench: refusal(
            bring(bench, hf(bench, "eoslist", {"bos_token_id": 0, "eos_token_id": 1})), "bos|eos"
        ),
    )

    def exported(bench: Bench) -> tuple[bool, str]:
        got = bring(bench, hf(bench, "chatml"))
        if got.status:
            return is_refusal(got, "eos|im_end|token"), got.short()

        out = bench.llama2("export", str(got.out), "--to", "gguf", "--out", "OUT.gguf")
        return out.status == 0 or is_refusal(out, "eos|im_end|token"), out.short()

    yield (
        "eos: an added item, exported",
        "what comes in can go out, or one rule refuses both",
        exported,
    )


# --- chat templates ---
def _templates() -> Iterator[tuple[str, str, Work]]:
    def never_laundered(made: Callable[[Bench], Path]) -> Work:
        """Served by its own template, or refused; never as if it had been Llama 2's."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = made(bench)
            got = bring(bench, place)
            if got.status:
                return is_refusal(got, "template"), got.short()

            return _own_template(bench, got.out, place)

        return work

    def without(bench: Bench) -> Path:
        place = hf(bench, "zephyr", {"tie_word_embeddings": False})
        settings = json.loads((place / "tokenizer_config.json").read_text())
        settings.pop("chat_template")
        (place / "tokenizer_config.json").write_text(json.dumps(settings))

        return place

    yield (
        "template: Zephyr's",
        "used, or serve refuses what import made",
        never_laundered(lambda bench: hf(bench, "zephyr")),
    )
    yield "template: none", "serve refuses what import made", never_laundered(without)
    yield (
        "template: ChatML's",
        "used, or serve refuses what import made",
        never_laundered(lambda bench: hf(bench, "chatml")),
    )
    yield (
        "template: Llama 2's",
        "served",
        lambda bench: (
            (service := bench.served(bring(bench, hf(bench, "eoslist")).out)).url is not None,
            service.said[-200:],
        ),
    )

    def named(bench: Bench) -> tuple[bool, str]:
        got = bring(bench, hf(bench, "zephyr"))
        return is_refusal(got, "template") or "template" in got.said, got.short()

    yield "template: import says so", "a template that is not Llama 2's is named", named

    def chatted(made: Callable[[Bench], Path], imported: bool) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = made(bench)
            place = bring(bench, place).out if imported else place
            got = bench.process("chat", str(place), "--max-tokens", "2", said="hi\n")
            served = bench.served(place)

            return is_refusal(got, "template") == bool(
                served.refusal
            ), f"{got.short()} | serve: {served.refusal[:100]}"

        return work

    for imported in (False, True):
        yield (
            f"chat as serve{', imported' if imported else ''}",
            "chat and serve refuse alike",
            chatted(lambda bench: hf(bench, "zephyr"), imported),
        )
        yield (
            f"chat as serve, no template{', imported' if imported else ''}",
            "chat and serve refuse alike",
            chatted(without, imported),
        )


def _own_template(bench: Bench, imported: Path, original: Path) -> tuple[bool, str]:
    """Whether the server refuses the model, or asks it as the original's own template says."""
    service = bench.served(imported)
    if service.url is None:
        return "template" in service.refusal, service.refusal or service.said[-200:]

    from transformers import AutoTokenizer

    theirs_ = AutoTokenizer.from_pretrained(original)
    if not theirs_.chat_template:
        return False, "served, though the model came without a template"

    expected = theirs_.apply_chat_template(
        ASK, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    found = service.chat().json()["usage"]["prompt_tokens"]
    return found == len(expected), f"{found} tokens of a prompt, {len(expected)} by its template"


# --- directories ---
def _directories() -> Iterator[tuple[str, str, Work]]:
    def changed(
        edit: Callable[[Path], None], expected: str = "", changes: Mapping[str, Any] | None = None
    ) -> Work:
        """A directory after an edit: transformers' logits of it before, or a refusal."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = hf(bench, "eoslist", changes)
            before = theirs(place, ids(place))
            edit(place)
            got = bring(bench, place)

            if expected:
                return refusal(got, expected)
            if got.status:
                return False, got.short()

            apart = float((ours(got.out, ids(place)) - before).abs().max())
            return apart < 1e-3, f"logits {apart:.2g} apart"

        return work

    def resave(place: Path, name: str = "model.safetensors", **more: Any) -> None:
        found = tensors(place)
        (place / "model.safetensors").unlink()
        save_file(
            {
                more.get("prefix", "") + key: value
                for key, value in found.items()
                if key != more.get("drop")
            },
            place / name,
            {"format": "pt"},
        )

    def linked(place: Path) -> None:
        """As the hub's cache: every file a link to a blob."""
        (place.parent / f"{place.name}-blobs").mkdir(exist_ok=True)
        for number, file in enumerate(sorted(place.iterdir())):
            blob = place.parent / f"{place.name}-blobs" / f"{number:040x}"
            file.replace(blob)
            file.symlink_to(blob)

    def sharded(place: Path) -> None:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
        (place / "model.safetensors").unlink()
        model.save_pretrained(place, max_shard_size="200KB")

    def no_index(place: Path) -> None:
        sharded(place)
        (place / "model.safetensors.index.json").unlink()

    yield "directory: the hub's cache", "links are followed", changed(linked)
    yield "directory: shards of transformers 5", "read", changed(sharded)
    yield "directory: shards without an index", "refused", changed(no_index, "index|safetensors")
    yield (
        "directory: a variant's name",
        "refused",
        changed(lambda place: resave(place, "model.fp16.safetensors"), "model.safetensors"),
    )
    yield (
        "directory: _orig_mod.",
        "refused, or read as what it is",
        changed(lambda place: resave(place, prefix="_orig_mod."), "_orig_mod|missing"),
    )
    yield (
        "directory: no head",
        "refused",
        changed(lambda place: resave(place, drop="lm_head.weight"), "lm_head"),
    )


# --- tokenizers ---
TEXTS = [
    "yend.  Next",
    "if x:\n    return 1",
    *(" " * count + "word" for count in range(1, 40)),
    *("the" + " " * count + "end" for count in range(1, 40)),
    "a\tb\n\n\nc",
    "the mat.  A  cat",
    "1987  3.14",
]


def meta_like(bench: Bench) -> Path:
    """The tiny model with a tokenizer whose whitespace items have Meta's scores: as the last of all
    merges."""
    from sentencepiece import sentencepiece_model_pb2

    place = bench.scratch / "meta-like"
    if not place.exists():
        shutil.copytree(bench.model, place)
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString((place / "tokenizer.model").read_bytes())
        spaces = 0

        for piece in proto.pieces:
            if len(piece.piece) > 1 and set(piece.piece) == {"\u2581"}:
                piece.score, spaces = -1e9, spaces + 1

        merged = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
        for count in range(2, 17) if not spaces else ():  # of the last no other is made
            merged[-count].piece, merged[-count].score = "\u2581" * count, -1e9

        Tokenizer(proto.SerializeToString()).save(place)
        (place / "checksums.json").unlink(missing_ok=True)

    return place


def _conversations(count: int) -> list[list[dict[str, str]]]:
    chance = random.Random(0)
    found = []
    for _ in range(count):
        turns = [
            {
                "role": ("user", "assistant")[turn % 2],
                "content": chance.choice(TEXTS).strip() or "a",
            }
            for turn in range(chance.choice([1, 1, 3, 5]))
        ]
        found.append(
            ([{"role": "system", "content": chance.choice(TEXTS)}] if chance.random() < 0.3 else [])
            + turns
        )

    return found


def _tokenizers() -> Iterator[tuple[str, str, Work]]:
    def in_transformers(made: Callable[[Bench], Path]) -> Work:
        """The ids of transformers in the directory that we write are SentencePiece's."""

        def work(bench: Bench) -> tuple[bool, str]:
            from transformers import AutoTokenizer

            out = bring(bench, made(bench)).out
            theirs_, mine = AutoTokenizer.from_pretrained(out), Tokenizer.load(out)
            # of a space in front it makes one item less
            wrong = [
                text
                for text in TEXTS
                if text[0] != " "
                and theirs_.encode(text, add_special_tokens=False) != mine.encode(text)
            ]
            astray = 0

            for turns in _conversations(500):
                asked = theirs_.apply_chat_template(turns, tokenize=True, return_dict=False)
                messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)  # type: ignore[arg-type]
                astray += list(asked) != list(encode_prompt(mine, messages))

            return (
                not wrong and not astray,
                f"{len(wrong)} texts and {astray} of 500 conversations differ {wrong[:2]}",
            )

        return work

    yield (
        "tokenizer: ordinary scores",
        "transformers gives SentencePiece's ids",
        in_transformers(lambda b: b.model),
    )
    yield (
        "tokenizer: whitespace merged last",
        "transformers gives SentencePiece's ids",
        in_transformers(meta_like),
    )

    def json_alone(bench: Bench) -> tuple[bool, str]:
        from transformers import AutoTokenizer

        place = hf(bench, "t5", {"vocab_size": 1024})
        theirs_ = AutoTokenizer.from_pretrained(place)
        got = bring(bench, place)

        if got.status or not (got.out / "tokenizer.model").exists():
            return False, got.short()

        mine = Tokenizer.load(got.out)
        texts = [*(text for text in TEXTS if text[0] != " "), "Hello, world", "été 🙂 日本"]
        wrong = [
            text
            for text in texts
            if theirs_.encode(text, add_special_tokens=False) != mine.encode(text)
        ]

        return not wrong, f"{got.short()} | {len(wrong)} of {len(texts)} texts differ {wrong[:3]}"

    yield "tokenizer: tokenizer.json alone", "read; ids as transformers'", json_alone

    def extra_spaces(bench: Bench) -> tuple[bool, str]:
        """SentencePiece's own default, which tokenizer.bin cannot say, is a note and not a
        failure."""
        import io

        import sentencepiece

        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                ["the cat sat on a mat", "why how what is tea", "sun moon and leaves"] * 50
            ),
            model_writer=written,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=1.0,
            minloglevel=2,
        )
        place = bench.scratch / "spaces"
        shutil.copytree(bench.model, place, dirs_exist_ok=True)
        size = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()
        (place / "tokenizer.model").write_bytes(written.getvalue())
        (place / "checksums.json").unlink(missing_ok=True)

        if size > 320:
            return False, f"{size} items"

        got = bring(bench, place)
        out = bench.llama2("export", str(got.out), "--to", "llama2c", "--out", "OUT.bin")
        return (
            out.status == 0 and "note" in out.said,
            f"import {got.short()} | export {out.short()}",
        )

    yield "export: llama2c of a tokenizer that drops spaces", "a note, exit 0", extra_spaces

    def hint(bench: Bench) -> tuple[bool, str]:
        place = bench.scratch / "karpathy"
        if not place.exists():
            place.mkdir()
            bench.llama2(
                "export", str(bench.model), "--to", "llama2c", "--out", str(place / "stories.bin")
            )
            for file in place.glob("tokenizer.bin"):
                file.rename(place / "tok320.bin")

        got = bring(bench, place / "stories.bin")
        return got.status == 0 and "tok320.bin" in got.said, got.short()

    yield "import: tok320.bin beside", "the file that may be its tokenizer is named", hint
    yield "tokenizer: half a pair", "a UserError", _half


def _half(bench: Bench) -> tuple[bool, str]:
    from llama2.errors import UserError

    try:
        Tokenizer.load(bench.model).encode("a \ud800")
    except UserError as error:
        return "surrogate" in str(error), str(error)

    return False, "encoded"
