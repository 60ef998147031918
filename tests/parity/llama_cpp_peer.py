"""Runs under an interpreter that has llama-cpp-python: answers questions about a GGUF file, one
JSON value a line.

{"file": path, "context": n} loads a model, keys and values in fp32; then {"logits": ids, "at":
positions} gives the logits at some positions; {"greedy": ids, "count": n} the ids that follow;
{"tokenize": text} the ids of a text; {"chat": [{"role", "content"}, ...]} those of a conversation
that waits for its answer, rendered by the template in the file; {"quantize": path, "to": path,
"type": number} makes a file of another type, from a quantized one, too, and answers with its
status.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format

F32 = 0  # ggml's number for it: by default keys and values are kept in fp16


_default_params = llama_cpp.llama_cpp.llama_model_default_params


def _plain_params() -> llama_cpp.llama_model_params:
    """Without rearranged weights: its kernels for AMX crash on some virtual machines, with its own
    files as well."""
    params = _default_params()
    params.use_extra_bufts = False
    return params


llama_cpp.llama_cpp.llama_model_default_params = _plain_params


def load(asked: dict) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        asked["file"],
        n_ctx=asked["context"],
        n_batch=512,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        type_k=F32,
        type_v=F32,
        # what the file says, not the library's own numbers
        yarn_attn_factor=-1.0,
        yarn_beta_fast=-1.0,
        yarn_beta_slow=-1.0,
        verbose=False,
    )


def tokenize_chat(model: llama_cpp.Llama, messages: list) -> list:
    """The ids of what llama.cpp's Python package would send, control tokens included."""
    texts = [
        model._model.token_get_text(token) if token >= 0 else ""
        for token in (model.token_eos(), model.token_bos())
    ]
    formatter = llama_chat_format.Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], *texts
    )
    prompt = formatter(messages=messages).prompt
    return model.tokenize(prompt.encode(), add_bos=False, special=True)


def answer(model: llama_cpp.Llama, asked: dict) -> list:
    if "tokenize" in asked:
        return model.tokenize(asked["tokenize"].encode(), add_bos=False, special=False)

    if "chat" in asked:
        return tokenize_chat(model, asked["chat"])

    if "quantize" in asked:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = asked["type"], 1, True
        return [
            llama_cpp.llama_model_quantize(
                asked["quantize"].encode(), asked["to"].encode(), ctypes.byref(params)
            )
        ]

    model.reset()
    if "logits" in asked:
        model.eval(asked["logits"])
        return np.array(model.scores)[asked["at"]].tolist()

    following = []
    model.eval(asked["greedy"])
    for _ in range(asked["count"]):
        following.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(following[-1:])

    return following


model = load(json.loads(sys.stdin.readline()))
print(json.dumps(model.metadata), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(model, json.loads(line))), flush=True)
