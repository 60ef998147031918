"""Cases of GGUF files of other writers: optional keys, scaling, quantizations, and tokenizers with
parts missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from checks import Work, is_refusal, refusal
from weights import ids, ours, tensors

from llama2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from run import Bench, Got

TEXTS = ["the cat sat", "  why  ", "été 🙂", "tea\n\nsun", "<s>x</s>"]


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _keys()
    yield from _vocabularies()
    yield "gguf: K-quants", "every tensor as the library makes it", _quantized


def plain(bench: Bench) -> Path:
    """The tiny model as its own export."""
    file = bench.scratch / "gguf" / "plain.gguf"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        got = bench.llama2(
            "export", str(bench.model), "--to", "gguf", "--type", "f32", "--out", str(file)
        )
        assert got.status == 0, got.said

    return file


def rewritten(
    bench: Bench,
    name: str,
    drop: tuple[str, ...] = (),
    put: Mapping[str, tuple[Any, str]] | None = None,
    more: Mapping[str, np.ndarray[Any, Any]] | None = None,
    retype: Any = None,
) -> Path:
    """A copy with keys dropped (beginnings of names), put, tensors added, or written in another
    type."""
    import gguf

    kinds, target = gguf.GGUFValueType, bench.scratch / "gguf" / f"{name}.gguf"
    reader, writer = gguf.GGUFReader(plain(bench)), gguf.GGUFWriter(target, "llama")

    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", *drop)) or key in (put or {}):
            continue

        array = field.types[0] == kinds.ARRAY
        writer.add_key_value(
            key,
            field.contents(),
            field.types[0],
            **({"sub_type": field.types[-1]} if array else {}),
        )

    for key, (value, kind) in (put or {}).items():
        array = isinstance(value, list)
        writer.add_key_value(
            key,
            value,
            kinds.ARRAY if array else kinds[kind],
            **({"sub_type": kinds[kind]} if array else {}),
        )

    for tensor in reader.tensors:
        content, kind = np.array(tensor.data), tensor.tensor_type
        if retype is not None and content.ndim > 1:
            kind, content = retype(tensor.name, content)

        writer.add_tensor(tensor.name, content, raw_dtype=kind)

    for key, values in (more or {}).items():
        writer.add_tensor(key, values)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    return target


def bring(bench: Bench, file: Path, *more: str) -> Got:
    return bench.llama2("import", str(file), "--out", "OUT", *more)


def _same(bench: Bench, got: Got, model: bool = True) -> tuple[bool, str]:
    """The model and the tokenizer that were exported."""
    if got.status:
        return False, got.short()

    apart = (
        float((ours(got.out, ids(bench.model)) - ours(bench.model, ids(bench.model))).abs().max())
        if model
        else 0.0
    )
    mine, found = Tokenizer.load(bench.model), Tokenizer.load(got.out)
    wrong = [text for text in TEXTS if mine.encode(text) != found.encode(text)]

    return apart == 0 and not wrong, f"{got.short()} | logits {apart:.2g} apart, {wrong} differ"


def _keys() -> Iterator[tuple[str, str, Work]]:
    def same(name: str, **how: Any) -> Work:
        return lambda bench: _same(bench, bring(bench, rewritten(bench, name, **how)))

    def refused(name: str, pattern: str, **how: Any) -> Work:
        return lambda bench: refusal(bring(bench, rewritten(bench, name, **how)), pattern)

    scaling = "llama.rope.scaling"
    head = 16  # the tiny model's, so that eight pairs turn
    yield "gguf: written again", "the same model", same("again")

    def scaled(name: str, kind: str, **how: Any) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            got = bring(bench, rewritten(bench, name, **how))
            if got.status:
                return False, got.short()

            rope = got.json("config.json")["rope_scaling"]
            return (rope["rope_type"], rope["factor"]) == (kind, 4.0), str(rope)

        return work

    for name, kind, keys in (
        ("factor without a type", "linear", {f"{scaling}.factor": (4.0, "FLOAT32")}),
        ("the old key of the scale", "linear", {"llama.rope.scale_linear": (4.0, "FLOAT32")}),
        *(
            (
                kind,
                kind,
                {f"{scaling}.type": (kind, "STRING"), f"{scaling}.factor": (4.0, "FLOAT32")},
            )
            for kind in ("linear", "yarn")
        ),
    ):
        yield f"gguf: {name}", "scaled positions", scaled(kind, kind, put=keys)

    yield (
        "gguf: longrope",
        "refused",
        refused("long", "longrope", put={f"{scaling}.type": ("longrope", "STRING")}),
    )

    for key in ("attn_factor", "yarn_log_multiplier"):
        yield (
            f"gguf: {key}",
            "refused",
            refused(key, "scal|factor|yarn", put={f"{scaling}.{key}": (2.0, "FLOAT32")}),
        )

    yield (
        "gguf: linear, factor 1",
        "the same model: nothing is scaled",
        same(
            "one",
            put={f"{scaling}.type": ("linear", "STRING"), f"{scaling}.factor": (1.0, "FLOAT32")},
        ),
    )
    yield (
        "gguf: factor 1 without a type",
        "the same model",
        same("one2", put={f"{scaling}.factor": (1.0, "FLOAT32")}),
    )
    yield (
        "gguf: type none",
        "the same model",
        same("none", put={f"{scaling}.type": ("none", "STRING")}),
    )
    yield (
        "gguf: rope_freqs of ones",
        "the same model",
        same("ones", more={"rope_freqs.weight": np.ones(head // 2, np.float32)}),
    )
    yield (
        "gguf: rope_freqs of Llama 3",
        "refused",
        refused(
            "freqs",
            "rope_freqs",
            more={"rope_freqs.weight": np.linspace(1, 8, head // 2).astype(np.float32)},
        ),
    )
    yield (
        "gguf: no BOS, no EOS",
        "the same model",
        same("noends", drop=("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")),
    )
    yield (
        "gguf: other widths of numbers",
        "the same model",
        same(
            "wide",
            put={"llama.block_count": (2, "UINT64"), "llama.rope.freq_base": (10000.0, "FLOAT64")},
        ),
    )
    yield (
        "gguf: EOS 300",
        "refused, or it ends an answer",
        lambda bench: _ends(bench, {"tokenizer.ggml.eos_token_id": (300, "UINT32")}),
    )
    yield (
        "gguf: BOS 0, EOS 1",
        "refused",
        refused(
            "ends",
            "BOS|EOS",
            put={
                "tokenizer.ggml.eos_token_id": (1, "UINT32"),
                "tokenizer.ggml.bos_token_id": (0, "UINT32"),
            },
        ),
    )
    yield (
        "gguf: not causal",
        "refused",
        refused("causal", "causal", put={"llama.attention.causal": (False, "BOOL")}),
    )
    yield (
        "gguf: experts",
        "refused",
        refused("experts", "expert", put={"llama.expert_count": (4, "UINT32")}),
    )

    for key, value in {
        "attention.sliding_window": (64, "UINT32"),
        "logit_scale": (0.5, "FLOAT32"),
        "residual_scale": (0.5, "FLOAT32"),
        "attention.scale": (0.02, "FLOAT32"),
        "embedding_scale": (12.0, "FLOAT32"),
        "use_parallel_residual": (True, "BOOL"),
        "attention.head_count_kv": ([2, 2], "INT32"),
    }.items():
        yield (
            f"gguf: {key}",
            "refused by name, or the same model, as llama.cpp reads no such key of a Llama",
            (
                lambda bench, key=key, value=value: _or_refused(
                    bench,
                    rewritten(bench, key, put={f"llama.{key}": value}),
                    key.rpartition(".")[2],
                )
            ),
        )


def _or_refused(bench: Bench, file: Path, pattern: str) -> tuple[bool, str]:
    got = bring(bench, file)
    return (True, got.short()) if is_refusal(got, pattern) else _same(bench, got)


def _ends(bench: Bench, put: Mapping[str, tuple[Any, str]]) -> tuple[bool, str]:
    """The id is refused, or ends an answer of the imported model."""
    got = bring(bench, rewritten(bench, "eos", put=put))
    if is_refusal(got, "eos"):
        return True, got.short()

    service = bench.served(got.out)
    if service.refusal:
        return "eos" in service.refusal.lower(), service.refusal

    answer = service.chat(max_tokens=20, logit_bias={"300": 100}).json()
    return answer["choices"][0]["finish_reason"] == "stop", f"{got.short()} | {answer['usage']}"


def _vocabularies() -> Iterator[tuple[str, str, Work]]:
    def made(name: str, key: str) -> Work:
        """Without an optional list: read as llama.cpp reads it, or cured by --tokenizer."""

        def work(bench: Bench) -> tuple[bool, str]:
            file = rewritten(bench, name, drop=(key,))
            got = bring(bench, file)
            if got.status == 0:
                return _same(bench, got) if key.endswith("token_type") else (True, got.short())

            right = (
                is_refusal(got, f"{name}.gguf")
                and "/llama2-" not in got.said
                and "--tokenizer" in got.said
            )
            cured = bring(bench, file, "--tokenizer", str(bench.model))
            same, after = _same(bench, cured)

            return right and same, f"{got.short()} | with --tokenizer: {after}"

        return work

    yield (
        "gguf: no scores",
        "read, or the file and --tokenizer are named, and it helps",
        made("no_scores", "tokenizer.ggml.scores"),
    )
    yield (
        "gguf: no token types",
        "read, or the file and --tokenizer are named, and it helps",
        made("no_types", "tokenizer.ggml.token_type"),
    )

    def cured(
        name: str, put: Mapping[str, tuple[Any, str]] | None = None, drop: tuple[str, ...] = ()
    ) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            file = rewritten(bench, name, put=put, drop=drop)
            return _same(bench, bring(bench, file, "--tokenizer", str(bench.model)))

        return work

    yield (
        "gguf: another kind of tokenizer",
        "--tokenizer helps",
        cured("gpt2", {"tokenizer.ggml.model": ("gpt2", "STRING")}),
    )
    yield "gguf: no tokenizer", "--tokenizer helps", cured("none2", drop=("tokenizer.",))
    foreign = (
        "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}</s>\n{% endfor %}<|assistant|>\n"
    )

    def template(bench: Bench) -> tuple[bool, str]:
        got = bring(
            bench,
            rewritten(bench, "template", put={"tokenizer.chat_template": (foreign, "STRING")}),
        )
        if got.status:
            return is_refusal(got, "template"), got.short()

        service = bench.served(got.out)
        if service.url is None:
            return "template" in service.refusal, service.refusal

        from service import ASK

        found = service.chat().json()["usage"]["prompt_tokens"]
        expected = len(
            Tokenizer.load(bench.model).encode(
                f"<|user|>\n{ASK[0]['content']}</s>\n<|assistant|>\n"
            )
        )

        return abs(found - expected) <= 8, f"{found} tokens of a prompt, {expected} by its template"

    yield "gguf: another's chat template", "used, or serve refuses what import made", template


def _quantized(bench: Bench) -> tuple[bool, str]:
    """Random blocks of K-quants, as llama.cpp's Q4_K_M mixes them, beside gguf's own
    dequantization."""
    import gguf
    import gguf.quants
    from weights import whole

    kinds = gguf.GGMLQuantizationType
    scales = {
        kinds.Q4_K: [0, 2],
        kinds.Q6_K: [208],
        kinds.Q5_K: [0, 2],
        kinds.Q3_K: [108],
        kinds.Q2_K: [80, 82],
    }
    chance, made = np.random.default_rng(0), {}

    def retype(name: str, content: np.ndarray[Any, Any]) -> tuple[Any, np.ndarray[Any, Any]]:
        kind = next(
            (
                kind
                for part, kind in (
                    ("output.weight", kinds.Q6_K),
                    ("attn_v", kinds.Q6_K),
                    ("ffn_down", kinds.Q6_K),
                    ("ffn_up", kinds.Q5_K),
                    ("ffn_gate", kinds.Q3_K),
                    ("attn_output", kinds.Q2_K),
                )
                if part in name
            ),
            kinds.Q4_K,
        )
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = chance.integers(0, 256, (content.size // block, size), dtype=np.uint8)

        for place in scales[kind]:
            scale = (chance.random(len(raw)) * 1e-3).astype(np.float16)
            raw[:, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8).reshape(
                len(raw), 2
            )

        made[name] = gguf.quants.dequantize(raw.reshape(content.shape[0], -1), kind)
        return kind, raw.reshape(content.shape[0], -1)

    place = whole(
        bench,
        bench.model,
        "quantized",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": None,
        },
    )
    (place / "checksums.json").unlink(missing_ok=True)
    file = bench.scratch / "gguf" / "quantized.gguf"
    plain(bench)
    made_ = bench.llama2("export", str(place), "--to", "gguf", "--type", "f32", "--out", str(file))
    assert made_.status == 0, made_.said
    kept = bench.scratch / "gguf" / "plain.gguf"
    saved = kept.read_bytes()
    kept.write_bytes(file.read_bytes())

    try:
        got = bring(bench, rewritten(bench, "k", retype=retype))
    finally:
        kept.write_bytes(saved)

    if got.status:
        return False, got.short()

    found = tensors(got.out)
    query = (
        torch.from_numpy(made["blk.0.attn_q.weight"])
        .view(8, -1, 2, 256)
        .transpose(1, 2)
        .reshape(256, 256)
    )
    right = torch.equal(query, found["model.layers.0.self_attn.q_proj.weight"]) and all(
        torch.equal(torch.from_numpy(made[theirs]), found[mine])
        for theirs, mine in {
            "output.weight": "lm_head.weight",
            "token_embd.weight": "model.embed_tokens.weight",
            "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
            "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
            "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
            "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        }.items()
    )

    return right, f"{got.short()} | {len(found)} tensors"
