"""llama.cpp as a side of engine.py: prefill and decode of even rows, greedy, on random weights.

    python benchmarks/llamacpp.py SIZE f32|bf16|q8_0|q4_1 ROWS THREADS COLUMNS
    python benchmarks/llamacpp.py MODEL.gguf file ROWS THREADS COLUMNS

Started by engine.py with an interpreter that has llama-cpp-python, gguf and numpy; needs nothing
else.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def write(path: Path, shape: dict[str, Any], kind: str) -> None:
    """A model file with random weights of the given shape."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    dim, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv, vocabulary = (
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape["vocab_size"],
    )
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_dimension_count(dim // heads)
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", *(f"w{token}".encode() for token in range(3, vocabulary))]
    )
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))

    def matrix(name: str, outputs: int, inputs: int) -> None:
        weights = random.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
        # 4 bits in the layers, as ours
        own = KINDS["bf16" if kind == "q4_1" and not name.startswith("blk.") else kind]
        writer.add_tensor(name, gguf.quants.quantize(weights, own), raw_dtype=own)

    matrix("token_embd.weight", vocabulary, dim)
    for layer in range(layers):
        for name, outputs, inputs in (
            ("attn_q", dim, dim),
            ("attn_k", dim // heads * kv, dim),
            ("attn_v", dim // heads * kv, dim),
            ("attn_output", dim, dim),
            ("ffn_gate", ffn, dim),
            ("ffn_up", ffn, dim),
            ("ffn_down", dim, ffn),
        ):
            matrix(f"blk.{layer}.{name}.weight", outputs, inputs)

        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(dim, np.float32))

    writer.add_tensor("output_norm.weight", np.ones(dim, np.float32))
    if not shape["tie_word_embeddings"]:
        matrix("output.weight", vocabulary, dim)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A loaded file and a context for `rows` sequences."""

    def __init__(self, path: Path, rows: int, columns: int, threads: int) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        # its kernels for AMX, which take quantized weights alone, crash on some virtual machines
        settings.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max = rows * columns, rows
        context.n_batch = context.n_ubatch = 2048
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.rows = rows
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, row, wanted) entries."""
        for index, (token, position, row, wanted) in enumerate(entries):
            self.batch.token[index], self.batch.pos[index] = token, position
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, row
            self.batch.logits[index] = wanted

        self.batch.n_tokens = len(entries)
        if llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")

    def best(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds of reading all prompts and of drawing the `new` - 1 tokens behind the first."""
        self.clear()
        begin = time.perf_counter()
        tokens: list[int] = []
        each = max(1, 2048 // len(prompts[0]))

        for start in range(0, self.rows, each):
            part = prompts[start : start + each]
            self.feed(
                [
                    (token, place, start + row, place == len(prompt) - 1)
                    for row, prompt in enumerate(part)
                    for place, token in enumerate(prompt)
                ]
            )
            tokens += [self.best((row + 1) * len(part[0]) - 1) for row in range(len(part))]

        read = time.perf_counter()
        for step in range(new - 1):
            place = len(prompts[0]) + step
            self.feed([(token, place, row, True) for row, token in enumerate(tokens)])
            tokens = [self.best(row) for row in range(self.rows)]

        return read - begin, time.perf_counter() - read


@llama_cpp.llama_log_callback
def _QUIET(level: int, text: bytes, data: Any) -> None:
    pass


def main() -> None:
    """Answers {"prompts": ..., "new": ...} with {"prefill": seconds, "decode": seconds}."""
    source, kind = sys.argv[1], sys.argv[2]
    rows, threads, columns = map(int, sys.argv[3:6])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(source if kind == "file" else f"{folder}/model.gguf")
        if kind != "file":
            write(path, json.loads(source), kind)

        model = Model(path, rows, columns, threads)
        for line in iter(sys.stdin.readline, ""):
            question = json.loads(line)
            prefill, decode = model.run(question["prompts"], question["new"])
            out.write(json.dumps({"prefill": prefill, "decode": decode}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
