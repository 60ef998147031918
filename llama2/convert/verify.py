"""`llama2 verify A B`: check whether two checkpoints, of whatever formats, are the same model.

It compares shapes and constants, every tensor, the tokenizers on texts that are hard to read, and
the outputs of both models on a sequence as long as the context. Exit status 0: equal within the
tolerance; 1: different.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field
from pydantic_core import to_jsonable_python

from llama2 import devices
from llama2.config import Config as Section
from llama2.convert import run_check
from llama2.convert.compare import (
    Outputs,
    Shapes,
    Tensors,
    compare_outputs,
    compare_shapes,
    compare_tensors,
    find_context,
)
from llama2.convert.tokenizer_probes import Tokenizers, compare_tokenizers
from llama2.errors import UserError
from llama2.formats.detect import open_model
from llama2.formats.progress import ReadingBar
from llama2.formats.stored_model import StoredModel
from llama2.ranks import join
from llama2.terminal_text import fit_line
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoints"
TOLERANCE = 1e-4


class Config(Section):
    """Compare two checkpoints of any formats, or one run with what it wrote; exit status 1 if they
    differ."""

    checkpoints: tuple[Path, ...] = Field(min_length=1)
    """two checkpoints: directories or files, of any format that can be read; or one finished run,
    or a recipe's directory, of which every file is read"""
    tolerance: float = Field(TOLERANCE, ge=0)
    """the largest difference allowed, of numbers in tensors and of logits (of scores, if they are
    reward models)"""
    length: int | None = Field(None, ge=0)
    """tokens of the sequence whose logits are compared (default: the context); 0 compares tensors
    alone"""
    as_json: Annotated[bool, tyro.conf.arg(name="json"), Field(alias="json")] = False
    """print the result as a JSON object"""


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared; None where nothing was."""

    shapes: Shapes
    tensors: Tensors | None
    tokenizer: Tokenizers | None
    outputs: Outputs | None
    notes: tuple[str, ...]

    def differences(self, tolerance: float) -> list[str]:
        """List, in words, the differences that make them two models; empty if they are the same."""
        differences = [*self.shapes.sizes, *self.shapes.constants]
        tensors, tokenizer, outputs = self.tensors, self.tokenizer, self.outputs
        if tensors and tensors.largest > tolerance:
            differences.append(f"tensors differ by up to {tensors.largest:.3g}, in {tensors.name}")

        if tokenizer and tokenizer.difference:
            differences.append(f"tokenizers differ: {tokenizer.difference}")

        if outputs and outputs.largest > tolerance:
            differences.append(
                f"{outputs.kind} differ by up to {outputs.largest:.3g}, first at position "
                f"{outputs.first_position}, after {outputs.first_layer}"
            )

        return differences


def run(config: Config) -> int:
    """Print the comparison on stdout; return the exit status."""
    if len(config.checkpoints) == 1:
        return run_check.show(config.checkpoints[0], config.as_json)
    if len(config.checkpoints) != 2:
        raise UserError(
            f"{len(config.checkpoints)} checkpoints are given",
            "give two: llama2 verify A B, or one run",
        )

    join()
    a, b = (open_model(path) for path in config.checkpoints)
    comparison = compare_models(a, b, length=config.length, tolerance=config.tolerance)
    differences = comparison.differences(config.tolerance)

    if config.as_json:
        result = {
            "a": str(a.path),
            "b": str(b.path),
            "equal": not differences,
            "differences": differences,
            "tolerance": config.tolerance,
            **asdict(comparison),
        }
        # JSON has no infinity: a difference without bound becomes null
        result = to_jsonable_python(result, inf_nan_mode="null")
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        verdict = f"different: {differences[0]}" if differences else "equal"
        print(fit_line(f"{'A':10}{a.path} ({a.format})"))
        print(fit_line(f"{'B':10}{b.path} ({b.format})"))
        stored = a.tokenizer or b.tokenizer
        tokenizer = Tokenizer.load(stored) if stored else None
        print(*map(fit_line, describe(comparison, config.tolerance, tokenizer)), sep="\n")
        print(fit_line(f"{'verdict':10}{verdict}"))

    return 1 if differences else 0


def compare_models(
    a: StoredModel, b: StoredModel, *, length: int | None = None, tolerance: float = TOLERANCE
) -> Comparison:
    """Compare two checkpoints.

    `length` is that of the sequence (None: the context of both, 0: no sequence).
    """
    shapes = compare_shapes(a, b)
    notes = list(shapes.notes)
    tokenizer = None

    if a.tokenizer and b.tokenizer:
        tokenizer = compare_tokenizers(a.tokenizer, b.tokenizer, (a.format, b.format))
        notes += tokenizer.notes
        for model in (a, b):
            tokenizer, more = _compare_json(model, tokenizer)
            notes += more
    else:
        lacking = [str(model.path) for model in (a, b) if model.tokenizer is None]
        notes.append(f"tokenizers were not compared: there is none in {' and '.join(lacking)}")

    if shapes.sizes:
        notes.append("models of other shapes cannot be compared further")
        return Comparison(shapes, None, tokenizer, None, tuple(notes))

    context = find_context(a.config, b.config)
    length = context if length is None else length
    if length > context:
        raise UserError(
            f"--length {length} exceeds the context of the models, {context}",
            "choose a shorter sequence",
        )

    size = a.count_bytes() + b.count_bytes()
    with ReadingBar("verify", size * (2 if length else 1)) as bar:
        a, b = bar.watch(a), bar.watch(b)
        tensors = compare_tensors(a, b)
        outputs = compare_outputs(a, b, length, tolerance, devices.choose()) if length else None

    return Comparison(shapes, tensors, tokenizer, outputs, tuple(notes))


def _compare_json(model: StoredModel, comparison: Tokenizers) -> tuple[Tokenizers, tuple[str, ...]]:
    """Compare a directory's tokenizer with the one that transformers reads there.

    Return `comparison` with that difference, and notes on texts that transformers cannot encode
    equally at all.
    """
    if model.tokenizer is None or not model.path.is_dir():
        return comparison, ()

    tokenizer = Tokenizer.load(model.tokenizer)
    disagreement = tokenizer.describe_disagreement(model.path)
    notes = tokenizer.describe_differences()
    if disagreement is None or notes:
        return comparison, notes

    return replace(comparison, difference=comparison.difference or disagreement), ()


def describe(
    comparison: Comparison, tolerance: float, tokenizer: Tokenizer | None = None
) -> Iterator[str]:
    """Yield the comparison in words, a line each; `tokenizer` spells tokens."""
    differences = [*comparison.shapes.sizes, *comparison.shapes.constants]
    yield f"{'shapes':10}{'; '.join(differences) or 'equal'}"

    if tensors := comparison.tensors:
        result = (
            f"{tensors.equal} of {tensors.count} equal; largest difference {tensors.largest:.3g} "
            f"in {tensors.name}; root mean square {tensors.spread:.2%} of the weights'"
        )
        if tensors.equal == tensors.count:
            result = f"{tensors.count}, all equal bit for bit"

        yield f"{'tensors':10}{result}"

    if tokenizers := comparison.tokenizer:
        result = f"equal: {tokenizers.items} items, {tokenizers.texts} texts"
        if tokenizers.identical:
            result = "the same file"

        yield f"{'tokenizer':10}{tokenizers.difference or result}"

    if outputs := comparison.outputs:
        yield f"{outputs.kind:10}{_describe_outputs(outputs, tolerance, tokenizer)}"

    for note in comparison.notes:
        yield f"{'note':10}{note}"


def _describe_outputs(outputs: Outputs, tolerance: float, tokenizer: Tokenizer | None) -> str:
    parts = [f"{outputs.positions} positions: largest difference {outputs.largest:.3g}"]
    if outputs.largest:
        parts[0] += (
            f" at position {outputs.position}, token {_spell(outputs.token, tokenizer)}; mean "
            f"{outputs.mean:.3g}"
        )

    if outputs.kind == "logits" and outputs.agreeing < 1:
        parts.append(f"{outputs.agreeing:.2%} of the likeliest tokens are the same")

    if outputs.first_position is not None and outputs.first_token is not None:
        token = _spell(outputs.first_token, tokenizer)
        parts.append(
            f"first beyond {tolerance:g} at position {outputs.first_position}, token {token}"
        )

    if outputs.first_layer is not None:
        parts.append(f"the first part that differs so is {outputs.first_layer}")

    return "; ".join(parts)


def _spell(token: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or token >= tokenizer.vocab_size:
        return str(token)

    return f"{token} ({tokenizer.bytes_of(token)!r})"
