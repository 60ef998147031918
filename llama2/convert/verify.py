"""`llama2 verify A B`: whether two checkpoints, in whatever formats, are the same model.

It compares shapes and constants, every tensor, the tokenizers on texts that are hard to read, and
what both models compute of a sequence as long as the context. Exit status 0: equal within the
tolerance; 1: different.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from llama2 import mesh
from llama2.config import Config as Base
from llama2.convert import compare, run_check, tokenizer_probes
from llama2.convert.compare import Outputs, Shapes, Tensors
from llama2.convert.tokenizer_probes import Tokenizers
from llama2.errors import UserError
from llama2.formats.detect import open_model
from llama2.formats.progress import Reading, size
from llama2.formats.stored_model import StoredModel
from llama2.terminal_text import line
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoints"
TOLERANCE = 1e-4


class Config(Base):
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
        """What makes them different models, in words; empty if they are the same."""
        return list(self._differences(tolerance))

    def _differences(self, tolerance: float) -> Iterator[str]:
        yield from (*self.shapes.sizes, *self.shapes.constants)
        if self.tensors is not None and self.tensors.largest > tolerance:
            yield f"tensors differ by up to {self.tensors.largest:.3g}, in {self.tensors.name}"

        if self.tokenizer is not None and self.tokenizer.difference:
            yield f"tokenizers differ: {self.tokenizer.difference}"

        if self.outputs is not None and self.outputs.largest > tolerance:
            yield (
                f"{self.outputs.kind} differ by up to {self.outputs.largest:.3g}, first at position "
                f"{self.outputs.first_position}, after {self.outputs.first_layer}"
            )


def run(config: Config) -> int:
    """Print the comparison on stdout; the exit status."""
    if len(config.checkpoints) == 1:
        return run_check.show(config.checkpoints[0], config.as_json)
    if len(config.checkpoints) != 2:
        raise UserError(
            f"{len(config.checkpoints)} checkpoints are given",
            "give two: llama2 verify A B, or one run",
        )

    mesh.init()
    a, b = (open_model(path) for path in config.checkpoints)
    found = compared(a, b, length=config.length, tolerance=config.tolerance)
    differences = found.differences(config.tolerance)

    if config.as_json:
        print(
            json.dumps(
                _finite(
                    {
                        "a": str(a.path),
                        "b": str(b.path),
                        "equal": not differences,
                        "differences": differences,
                        "tolerance": config.tolerance,
                        **asdict(found),
                    }
                ),
                indent=1,
                allow_nan=False,
            )
        )
    else:
        for side, source in zip("AB", (a, b)):
            print(line(f"{side:10}{source.path} ({source.format})"))

        print(*map(line, lines(found, config.tolerance, _pieces(a, b))), sep="\n")
        print(line(f"{'verdict':10}{f'different: {differences[0]}' if differences else 'equal'}"))

    return 1 if differences else 0


def _finite(value: Any) -> Any:
    """`value` as JSON can say it, which has no infinity: a difference without bound becomes
    null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]

    return None if isinstance(value, float) and not math.isfinite(value) else value


def compared(
    a: StoredModel, b: StoredModel, *, length: int | None = None, tolerance: float = TOLERANCE
) -> Comparison:
    """Compare two checkpoints; `length` is that of the sequence (None: the context of both, 0:
    none)."""
    shapes = compare.shapes(a, b)
    notes = list(shapes.notes)
    tokenizer = None

    if a.tokenizer and b.tokenizer:
        tokenizer = tokenizer_probes.compare(a.tokenizer, b.tokenizer, (a.format, b.format))
        notes += tokenizer.notes
        for side in (a, b):
            tokenizer, more = _beside(side, tokenizer)
            notes += more
    else:
        lacking = [str(side.path) for side in (a, b) if side.tokenizer is None]
        notes.append(f"tokenizers were not compared: there is none in {' and '.join(lacking)}")

    if shapes.sizes:
        return Comparison(
            shapes,
            None,
            tokenizer,
            None,
            (*notes, "models of other shapes cannot be compared further"),
        )

    longest = compare.context(a.config, b.config)
    length = longest if length is None else length
    if length > longest:
        raise UserError(
            f"--length {length} exceeds the context of the models, {longest}",
            "choose a shorter sequence",
        )

    with Reading("verify", size((a, b)) * (2 if length else 1)) as bar:
        a, b = bar.watched(a), bar.watched(b)
        tensors = compare.tensors(a, b)
        outputs = compare.outputs(a, b, length, tolerance, mesh.device()) if length else None

    return Comparison(shapes, tensors, tokenizer, outputs, tuple(notes))


def _beside(side: StoredModel, found: Tokenizers) -> tuple[Tokenizers, tuple[str, ...]]:
    """`found`, and as a difference if transformers reads another tokenizer in a directory than we;
    what it cannot do at all is a note."""
    if side.tokenizer is None or not side.path.is_dir():
        return found, ()

    tokenizer = Tokenizer.load(side.tokenizer)
    said = tokenizer.describe_disagreement(side.path)
    if said is None or tokenizer.describe_differences():
        return found, tokenizer.describe_differences()

    return replace(found, difference=found.difference or said), ()


def _pieces(a: StoredModel, b: StoredModel) -> Tokenizer | None:
    path = a.tokenizer or b.tokenizer
    return Tokenizer.load(path) if path else None


def lines(found: Comparison, tolerance: float, pieces: Tokenizer | None = None) -> Iterator[str]:
    """The comparison in words; `pieces` spells tokens."""
    different = [*found.shapes.sizes, *found.shapes.constants]
    yield f"{'shapes':10}{'; '.join(different) if different else 'equal'}"
    if (tensors := found.tensors) is not None:
        yield f"{'tensors':10}" + (
            f"{tensors.count}, all equal bit for bit"
            if tensors.equal == tensors.count
            else f"{tensors.equal} of {tensors.count} equal; largest difference {tensors.largest:.3g} in {tensors.name}; "
            f"root mean square {tensors.spread:.2%} of the weights'"
        )

    if (tokenizer := found.tokenizer) is not None:
        yield f"{'tokenizer':10}" + (
            tokenizer.difference
            or (
                "the same file"
                if tokenizer.identical
                else f"equal: {tokenizer.items} items, {tokenizer.texts} texts"
            )
        )

    if found.outputs is not None:
        yield f"{found.outputs.kind:10}{_outputs(found.outputs, tolerance, pieces)}"

    yield from (f"{'note':10}{note}" for note in found.notes)


def _outputs(found: Outputs, tolerance: float, pieces: Tokenizer | None) -> str:
    parts = [f"{found.positions} positions: largest difference {found.largest:.3g}"]
    if found.largest:
        parts[0] += (
            f" at position {found.position}, token {_token(found.token, pieces)}; mean {found.mean:.3g}"
        )

    if found.kind == "logits" and found.agreeing < 1:
        parts.append(f"{found.agreeing:.2%} of the likeliest tokens are the same")

    if found.first_position is not None and found.first_token is not None:
        parts.append(
            f"first beyond {tolerance:g} at position {found.first_position}, token "
            f"{_token(found.first_token, pieces)}"
        )

    if found.first_layer is not None:
        parts.append(f"the first part that differs so is {found.first_layer}")

    return "; ".join(parts)


def _token(token: int, pieces: Tokenizer | None) -> str:
    if pieces is None or token >= pieces.vocab_size:
        return str(token)

    return f"{token} ({pieces.bytes_of(token)!r})"
