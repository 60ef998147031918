"""Cost of weights of fewer bits on text that the model has not seen: `llama2 quantize CHECKPOINT
--data TEXT`.

For each precision: which matrices are rounded and which are not and why, what they take before and
after, and how far the model that the engine then serves is from the one in fp32: its perplexity,
the log-probabilities of the text's tokens, and how often it would choose another token when it
decodes greedily. The paper does not say how its models are served.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field

from llama2 import atomic
from llama2.config import Config as Section
from llama2.data.documents import Split, read_documents
from llama2.formats.checkpoint import config_of, load, load_tokenizer
from llama2.generate.engine import Engine
from llama2.generate.score import predict_tokens
from llama2.model import quantize
from llama2.model.llama import Llama, LlamaConfig
from llama2.ranks import Ranks, join
from llama2.records import Document, dump
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoint"
REPORT = "report.json"
TokenRows = list[list[int]]
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")


class Config(Section):
    """Measure what rounding the weights of a checkpoint costs."""

    checkpoint: Path
    """directory of the model"""
    data: tuple[Path, ...] = Field(min_length=1)
    """held-out text: files, folders or globs of text, JSONL (.gz, .zst), parquet"""
    split: Split = "file"
    """what one document of a plain text file is"""
    precisions: tuple[Literal["bf16", "int8", "int4"], ...] = Field(
        ("bf16", "int8", "int4"), min_length=1
    )
    """of weights; int4 needs torchao"""
    tokens: int = Field(65536, gt=0)
    """read documents until there are so many"""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, alias="json")
    """print the report as JSON"""
    out: Path | None = None
    """a directory: report.json is written there"""


def run(config: Config) -> None:
    """Print the report, and write it into `out`."""
    ranks = join()
    for precision in config.precisions:
        quantize.check(precision)

    shape = config_of(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint, shape)
    model = load(config.checkpoint, device=ranks.device).eval().requires_grad_(False)
    count, rows = cut_windows(
        read_documents(config.data, split=config.split),
        tokenizer,
        shape.max_position_embeddings,
        config.tokens,
    )
    report = {
        "checkpoint": str(config.checkpoint),
        "documents": count,
        **measure(model, rows, config.precisions, ranks),
    }

    if not ranks.is_main:
        return

    if config.out is not None:
        atomic.write_atomic(config.out / REPORT, dump(report))

    print(json.dumps(report, indent=1) if config.json_ else "\n".join(_lines(report)))


def cut_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, tokens: int
) -> tuple[int, TokenRows]:
    """Return the number of documents that make `tokens` tokens, and these in rows of at most
    `context`.

    Each document stands between `document_start` and EOS. Neighbouring rows of a long one share a
    token, so that every token but the first is predicted once.
    """
    rows: TokenRows = []
    count, left = 0, tokens
    for document in documents:
        text = tokenizer.encode(document.text)
        ids = [tokenizer.document_start, *text, tokenizer.eos][: left + 1]
        rows += [ids[begin : begin + context] for begin in range(0, len(ids) - 1, context - 1)]
        count, left = count + 1, left - len(ids) + 1

        if left <= 0:
            break

    return count, rows


def measure(
    model: Llama,
    rows: TokenRows,
    precisions: Sequence[quantize.WeightPrecision],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Report on a model, whose weights are fp32: coverage and loss of each precision."""
    logp_N, best_N = _predicted(model, rows, "fp32", ranks)
    report: dict[str, Any] = {
        "tokens": len(logp_N),
        "fp32": {
            "perplexity": _perplexity(logp_N),
            "bytes": sum(4 * weight.numel() for weight in model.parameters()),
        },
    }
    for precision in precisions:
        served = Engine(model, precision=precision).refresh()
        own_N, choice_N = _predicted(served, rows, precision, ranks)
        gaps_N, covered = (own_N - logp_N).abs(), measure_coverage(model.config, precision)
        perplexity = _perplexity(own_N)
        report[precision] = {
            "perplexity": perplexity,
            "change": perplexity / report["fp32"]["perplexity"] - 1,
            "mean_difference": float(gaps_N.mean()),
            "max_difference": float(gaps_N.max()),
            "other_choices": float((choice_N != best_N).double().mean()),
            "bytes": sum(row["after"] for row in covered),
            "coverage": covered,
        }

    return report


def measure_coverage(
    shape: LlamaConfig, precision: quantize.WeightPrecision
) -> list[dict[str, Any]]:
    """Tell what becomes of each parameter, all layers together.

    A row holds its name and shape, how many there are, in what they are kept, their bytes in fp32
    and after, and why they are not rounded if they are not.
    """
    with torch.device("meta"):
        model = Llama(shape)

    rows: dict[str, dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        after = weight.numel() * (4 if precision == "fp32" else 2)
        reason = ""
        if precision == "int8" or precision == "int4":
            reason = quantize.reason_to_keep(
                name, weight, precision, tied=shape.tie_word_embeddings
            )
            if not reason:
                after = quantize.count_bytes(weight.shape[0], weight.shape[1], precision)

        name = _LAYER.sub("*", name)
        row = rows.setdefault(
            name,
            {
                "name": name,
                "count": 0,
                "shape": list(weight.shape),
                "kept_in": "bf16" if reason else precision,
                "before": 0,
                "after": 0,
                "reason": reason,
            },
        )
        row["count"] += 1
        row["before"] += 4 * weight.numel()
        row["after"] += after

    return list(rows.values())


def _predicted(
    model: Llama, rows: TokenRows, precision: quantize.WeightPrecision, ranks: Ranks | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of every token (float64 N), and the likeliest token in its place (N)."""
    predicted = predict_tokens(model, rows, quantize.compute_precision(precision), ranks=ranks)
    logp_N = torch.tensor([logp for logps, _ in predicted for logp in logps], dtype=torch.double)
    best_N = torch.tensor([token for _, tokens in predicted for token in tokens])
    return logp_N, best_N


def _perplexity(logp_N: torch.Tensor) -> float:
    return math.exp(-float(logp_N.mean()))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as text."""
    measured = [name for name in ("bf16", "int8", "int4") if name in report]
    for name in measured:
        if name != "bf16":
            yield f"{name}: what is rounded"
            yield from _coverage_lines(report[name]["coverage"])
            yield ""

    yield f"{report['tokens']:,} tokens of {report['documents']:,} documents"
    yield from _loss_lines({name: report[name] for name in ("fp32", *measured)})


def _coverage_lines(coverage: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows: list[Sequence[object]] = [
        ("parameter", "number", "shape", "kept in", "MB in fp32", "MB", "")
    ]
    for row in coverage:
        shape = " x ".join(map(str, row["shape"]))
        sizes = (_megabytes(row["before"]), _megabytes(row["after"]))
        rows.append((row["name"], row["count"], shape, row["kept_in"], *sizes, row["reason"]))

    return _table(rows, left=(0, 2, 3, 6))


def _loss_lines(losses: dict[str, dict[str, Any]]) -> Iterator[str]:
    mean = "|difference of log p|: mean"
    rows: list[Sequence[object]] = [
        ("weights", "MB", "perplexity", "change", mean, "most", "other choices")
    ]
    for name, loss in losses.items():
        row = [name, _megabytes(loss["bytes"]), f"{loss['perplexity']:.4f}"]
        if name != "fp32":
            row += [f"{loss['change']:+.2%}", f"{loss['mean_difference']:.4f}"]
            row += [f"{loss['max_difference']:.3f}", f"{loss['other_choices']:.2%}"]

        rows.append([*row, "", "", "", ""][:7])

    return _table(rows, left=(0,))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3f}"


def _table(rows: Sequence[Sequence[object]], left: Sequence[int]) -> Iterator[str]:
    """Yield the rows in columns as wide as their widest entry; numbers stand to the right.

    By hand because rich wraps what is wider than the terminal.
    """
    texts = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for row in texts:
        line = " "
        for column, (text, width) in enumerate(zip(row, widths)):
            line += " " + (text.ljust(width) if column in left else text.rjust(width)) + " "

        yield line.rstrip()
