"""`llama2 quantize CHECKPOINT --data TEXT`: what weights of fewer bits cost, on text that the model
has not seen.

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

from llama2 import atomic, mesh
from llama2 import config as configuration
from llama2.data.documents import Split, read_documents
from llama2.formats.checkpoint import config_of, load, load_tokenizer
from llama2.generate.engine import Engine
from llama2.generate.score import predictions
from llama2.model import quantize
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Document, dump
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoint"
REPORT = "report.json"
Rows = list[list[int]]
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")


class Config(configuration.Config):
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
    mesh.init()
    for precision in config.precisions:
        quantize.check(precision)

    shape = config_of(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint, shape)
    model = load(config.checkpoint, device=mesh.device()).eval().requires_grad_(False)
    count, rows = windows(
        read_documents(config.data, split=config.split),
        tokenizer,
        shape.max_position_embeddings,
        config.tokens,
    )
    report = {
        "checkpoint": str(config.checkpoint),
        "documents": count,
        **measure(model, rows, config.precisions),
    }

    if not mesh.is_main():
        return

    if config.out is not None:
        atomic.write_atomic(config.out / REPORT, dump(report))

    print(json.dumps(report, indent=1) if config.json_ else "\n".join(_lines(report)))


def windows(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, tokens: int
) -> tuple[int, Rows]:
    """The number of documents that make `tokens` tokens, and these in rows of at most `context`,
    each between BOS and EOS. Neighbouring rows of a long document share one token, so that every
    token but BOS is predicted once."""
    rows: Rows = []
    count, left = 0, tokens
    for document in documents:
        ids = [tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos][: left + 1]
        rows += [ids[begin : begin + context] for begin in range(0, len(ids) - 1, context - 1)]
        count, left = count + 1, left - len(ids) + 1

        if left <= 0:
            break

    return count, rows


def measure(
    model: Llama, rows: Rows, precisions: Sequence[quantize.WeightPrecision]
) -> dict[str, Any]:
    """The report on a model, whose weights are fp32: coverage and loss of each precision."""
    logp_N, best_N = _predicted(model, rows, "fp32")
    report: dict[str, Any] = {
        "tokens": len(logp_N),
        "fp32": {
            "perplexity": _perplexity(logp_N),
            "bytes": sum(4 * weight.numel() for weight in model.parameters()),
        },
    }
    for precision in precisions:
        served = Engine(model, precision=precision).current()
        own_N, choice_N = _predicted(served, rows, precision)
        gaps_N, covered = (own_N - logp_N).abs(), coverage(model.config, precision)
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


def coverage(shape: LlamaConfig, precision: quantize.WeightPrecision) -> list[dict[str, Any]]:
    """What becomes of each kind of parameter, all layers together: how many there are, in what they
    are kept, their bytes in fp32 and after, and why those that are not rounded are not."""
    with torch.device("meta"):
        model = Llama(shape)

    rows: dict[str, dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        bits = precision if precision == "int8" or precision == "int4" else None
        reason = quantize.kept(name, weight, bits, tied=shape.tie_word_embeddings) if bits else ""
        after = weight.numel() * (4 if precision == "fp32" else 2)

        if bits and not reason:
            after = quantize.size(weight.shape[0], weight.shape[1], bits)

        row = rows.setdefault(
            _LAYER.sub("*", name),
            {
                "name": _LAYER.sub("*", name),
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
    model: Llama, rows: Rows, precision: quantize.WeightPrecision
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of every token, and the likeliest token in its place."""
    found = predictions(model, rows, quantize.computing(precision))
    return (
        torch.tensor([value for own, _ in found for value in own], dtype=torch.double),
        torch.tensor([token for _, best in found for token in best]),
    )


def _perplexity(logp_N: torch.Tensor) -> float:
    return math.exp(-float(logp_N.mean()))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    measured = [name for name in ("bf16", "int8", "int4") if name in report]
    for name in [name for name in measured if name != "bf16"]:
        yield f"{name}: what is rounded"
        yield from _table(
            [
                ("parameter", "number", "shape", "kept in", "MB in fp32", "MB", ""),
                *(
                    (
                        row["name"],
                        row["count"],
                        " x ".join(map(str, row["shape"])),
                        row["kept_in"],
                        _megabytes(row["before"]),
                        _megabytes(row["after"]),
                        row["reason"],
                    )
                    for row in report[name]["coverage"]
                ),
            ],
            words=(0, 2, 3, 6),
        )
        yield ""

    yield f"{report['tokens']:,} tokens of {report['documents']:,} documents"
    yield from _table(
        [
            (
                "weights",
                "MB",
                "perplexity",
                "change",
                "|difference of log p|: mean",
                "most",
                "other choices",
            ),
            (
                "fp32",
                _megabytes(report["fp32"]["bytes"]),
                f"{report['fp32']['perplexity']:.4f}",
                "",
                "",
                "",
                "",
            ),
            *(
                (
                    name,
                    _megabytes(one["bytes"]),
                    f"{one['perplexity']:.4f}",
                    f"{one['change']:+.2%}",
                    f"{one['mean_difference']:.4f}",
                    f"{one['max_difference']:.3f}",
                    f"{one['other_choices']:.2%}",
                )
                for name, one in ((name, report[name]) for name in measured)
            ),
        ],
        words=(0,),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3f}"


def _table(rows: Sequence[Sequence[object]], words: Sequence[int]) -> Iterator[str]:
    """Columns as wide as their widest entry, `words` to the left and the others to the right."""
    texts = [[str(entry) for entry in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for row in texts:
        cells = (
            text.ljust(width) if place in words else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths))
        )
        yield ("  " + "  ".join(cells)).rstrip()


__all__ = ["Config", "coverage", "measure", "run", "windows"]
