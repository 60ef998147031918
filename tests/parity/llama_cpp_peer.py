"""Runs under an interpreter that has llama-cpp-python: answers questions about a GGUF file, one JSON value a line.

{"file": path, "context": n} loads a model, keys and values in fp32; then {"logits": ids, "at": positions} gives the
logits at some positions; {"greedy": ids, "count": n} the ids that follow; {"tokenize": text} the ids of a text.
"""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0  # ggml's number for it: by default keys and values are kept in fp16


def load(asked: dict) -> llama_cpp.Llama:
    return llama_cpp.Llama(asked["file"], n_ctx=asked["context"], n_batch=512, logits_all=True, n_threads=1,
                           n_threads_batch=1, type_k=F32, type_v=F32, verbose=False)


def answer(model: llama_cpp.Llama, asked: dict) -> list:
    if "tokenize" in asked:
        return model.tokenize(asked["tokenize"].encode(), add_bos=False, special=False)
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
