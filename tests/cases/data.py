"""Cases of data: files, rows, labels, flags, folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks import Work, is_refusal, ok, refusal

if TYPE_CHECKING:
    from run import Bench, Got


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _labels()
    yield from _readers()
    yield from _folders()


# --- what is checked ---


def _prepare(kind: str, file: str, *more: str) -> Callable[[Bench], Got]:
    return lambda bench: bench.llama2(
        "prepare",
        "--kind",
        kind,
        "--sources.s.path",
        bench.file(f"data/{file}"),
        "--out",
        "OUT",
        *more,
    )


def _kept(got: Got, kind: str) -> list[dict[str, Any]]:
    return got.records(f"{kind}.jsonl")


def _is(
    kind: str, file: str, test: Callable[[list[dict[str, Any]]], bool], *more: str, said: str = ""
) -> Work:
    """The records that come of a file pass a test; `said` is a pattern for what is printed."""

    def work(bench: Bench) -> tuple[bool, str]:
        got = _prepare(kind, file, *more)(bench)
        found = _kept(got, kind)
        right = got.status == 0 and test(found) and bool(re.search(said, got.said))

        return right, f"{got.short()} | {json.dumps(found, ensure_ascii=False)[:300]}"

    return work


def _refused(kind: str, file: str, pattern: str, *more: str) -> Work:
    """One line with a cause and a cure, exit status 2."""

    def work(bench: Bench) -> tuple[bool, str]:
        got = _prepare(kind, file, *more)(bench)
        return is_refusal(got, pattern), got.short()

    return work


def _either(first: Work, second: Work) -> Work:
    """Read rightly or refused by name: both are right."""

    def work(bench: Bench) -> tuple[bool, str]:
        right, got = first(bench)
        if right:
            return right, got

        other, also = second(bench)
        return other, also if other else f"{got} / {also}"

    return work


def _texts(record: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in record["messages"]]


def _answers(found: list[dict[str, Any]]) -> list[str]:
    """The answers that carry loss."""
    learnt = []
    for record in found:
        answers = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        train = record.get("train", "all")
        mask = (
            [True] * len(answers)
            if train == "all"
            else ([False] * (len(answers) - 1) + [True] if train == "last" else train)
        )
        learnt += [answer for answer, kept in zip(answers, mask, strict=True) if kept]

    return sorted(learnt)


def _learns(file: str, answers: list[str], *more: str, said: str = "") -> Work:
    return _is("dialogs", file, lambda found: _answers(found) == sorted(answers), *more, said=said)


# --- the cases ---


def _labels() -> Iterator[tuple[str, str, Work]]:
    yield (
        "kto_pc",
        "the answer marked bad is left out and counted",
        _learns("kto_pc.jsonl", ["GOOD"], said="bad"),
    )
    yield "kto_int", "label 0 is bad as well", _learns("kto_int.jsonl", ["GOOD"], said="bad")
    yield "weight0", "weight 0 carries no loss", _learns("weight0.jsonl", ["good"])
    yield "train_false", "train: false carries no loss", _learns("train_false.jsonl", ["good"])
    yield (
        "hetero",
        "a first row without flags, later ones with: all kept",
        _learns("hetero.jsonl", ["hi", "x", "y"]),
    )
    yield (
        "uf",
        "ties and pairs that contradict their scores make no pair",
        _refused("preferences", "uf.jsonl", "score|tie"),
    )
    yield (
        "harmless-proj",
        "a folder called harmless does not make a pair `safe`",
        _is(
            "preferences",
            "harmless-proj/data/helpful.jsonl",
            lambda found: [one["axis"] for one in found] == ["helpful"],
        ),
    )
    yield (
        "oaip",
        "two equal answers make no pair",
        _refused("preferences", "oaip.jsonl", "identical|equal|same"),
    )
    yield (
        "ident",
        "empty and identical pairs of our own format are left out",
        _is(
            "preferences",
            "ident.jsonl",
            lambda found: (
                all(one["responses"][0]["text"] != one["responses"][1]["text"] for one in found)
                and all(response["text"] for one in found for response in one["responses"])
            ),
            said="left out|skipped",
        ),
    )
    yield (
        "tools",
        "tool calls are refused by name or left out and counted",
        _refused("dialogs", "tools.jsonl", "tool"),
    )
    yield (
        "instruction_input",
        "the input stands in the prompt",
        _is(
            "prompts",
            "instruction_input.jsonl",
            lambda found: (
                len(found) == 3
                and any("burnt in 1820" in str(one) for one in found)
                and any("Another text" in str(one) for one in found)
            ),
        ),
    )
    yield (
        "qa_context",
        "the context stands in the prompt",
        _is(
            "dialogs",
            "qa_context.jsonl",
            lambda found: len(found) == 2 and all("1746" in _texts(one)[0] for one in found),
        ),
    )
    yield (
        "boolq",
        "the passage is read, or the row refused by name",
        _either(
            _is("prompts", "boolq.jsonl", lambda found: len(found) == 2 and "1746" in str(found)),
            _refused("prompts", "boolq.jsonl", "passage|answer"),
        ),
    )
    yield (
        "agieval",
        "the passage is read, or the row refused by name",
        _either(
            _is("prompts", "agieval.jsonl", lambda found: "1746" in str(found)),
            _refused("prompts", "agieval.jsonl", "passage|options"),
        ),
    )


def _readers() -> Iterator[tuple[str, str, Work]]:
    yield (
        "quote.csv",
        "the line where the quote opened is named",
        _refused("dialogs", "quote.csv", r"quote\.csv:2"),
    )
    yield (
        "quote.csv skip",
        "also with malformed: skip nothing is swallowed",
        _either(
            _refused("dialogs", "quote.csv", "quote|csv", "--sources.s.malformed", "skip"),
            _is(
                "dialogs",
                "quote.csv",
                lambda found: all(len(text) < 50 for one in found for text in _texts(one)),
                "--sources.s.malformed",
                "skip",
            ),
        ),
    )
    yield (
        "duph.csv",
        "a header name given twice is refused",
        _refused("dialogs", "duph.csv", "two columns"),
    )
    yield (
        "alpaca.tsv",
        "read by its header",
        _is(
            "dialogs",
            "alpaca.tsv",
            lambda found: _answers(found) == ["5"] and "2 and 3" in str(found),
        ),
    )
    yield "qa.tsv", "read by its header", _learns("qa.tsv", ["A drink"])
    yield (
        "nohead.csv",
        "a CSV without a header is refused by name",
        _refused("dialogs", "nohead.csv", "nohead.csv"),
    )
    yield (
        "cr.csv",
        "CR alone ends a line, or is named",
        _either(_learns("cr.csv", ["hello", "ok"]), _refused("dialogs", "cr.csv", r"cr\.csv")),
    )
    yield (
        "nl.csv",
        "a quoted line end belongs to its cell, without CR",
        _is(
            "dialogs",
            "nl.csv",
            lambda found: (
                "Say\nhi" in str([_texts(one) for one in found]).replace("\\n", "\n")
                and "\\r" not in json.dumps(found)
            ),
        ),
    )
    yield (
        "lat.csv",
        "not UTF-8, with file and line",
        _refused("dialogs", "lat.csv", r"lat\.csv:2.*UTF-8"),
    )
    yield (
        "null_conv",
        "a null conversation has no turns: left out and counted, no crash",
        _learns("null_conv.jsonl", ["yo"], said="no turns 1"),
    )
    yield (
        "null_conv skip",
        "... and can be skipped",
        _learns("null_conv.jsonl", ["yo"], "--sources.s.malformed", "skip"),
    )
    yield (
        "surr",
        "a lone surrogate is named with file and line",
        _refused("dialogs", "surr.jsonl", r"surr\.jsonl:1.*surrogate"),
    )
    yield (
        "surr skip",
        "... and can be skipped",
        _learns("surr.jsonl", ["hi"], "--sources.s.malformed", "skip"),
    )
    yield (
        "surrogate",
        "likewise in our own format",
        _refused("dialogs", "surrogate.jsonl", r"surrogate\.jsonl:1"),
    )
    yield (
        "surrogate skip",
        "... and can be skipped",
        _learns("surrogate.jsonl", ["Hello"], "--sources.s.malformed", "skip"),
    )
    yield (
        "corrupt.parquet",
        "a damaged page is one line",
        _refused("dialogs", "corrupt.parquet", r"corrupt\.parquet"),
    )
    yield (
        "trunc.parquet",
        "a truncated file is one line",
        _refused("dialogs", "trunc.parquet", r"trunc\.parquet"),
    )
    yield (
        "in.parquet",
        "read",
        _is("dialogs", "in.parquet", lambda found: len(found) > 0 and "answer 10" in str(found)),
    )
    yield (
        "syntax",
        "a line that is no JSON is named",
        _refused("dialogs", "syntax.jsonl", r"syntax\.jsonl:2"),
    )
    yield (
        "syntax skip",
        "... and skipped and counted",
        _learns("syntax.jsonl", ["hi", "4"], "--sources.s.malformed", "skip", said="1"),
    )
    yield (
        "firstbad skip",
        "a first row in no format is skipped too",
        _is(
            "dialogs",
            "firstbad.jsonl",
            lambda found: _answers(found)[:1] == ["hi"],
            "--sources.s.malformed",
            "skip",
        ),
    )
    yield (
        "empty_system",
        "an empty system turn is no turn",
        _learns("empty_system.jsonl", [f"a{i}" for i in range(5)]),
    )
    yield (
        "empty_system_id",
        "... with an id too",
        _learns("empty_system_id.jsonl", [f"a{i}" for i in range(5)]),
    )
    yield (
        "empty_system_some",
        "... in some rows too",
        _is("dialogs", "empty_system_some.jsonl", lambda found: len(found) == 6),
    )
    yield "parts", "content as a list of text parts", _learns("parts.jsonl", ["yo"])
    yield (
        "part_out",
        "OpenAI's input_text and output_text are text",
        _learns("part_out.jsonl", ["yo"]),
    )
    yield (
        "part_null",
        "a null text never becomes the word None",
        _either(
            _refused("dialogs", "part_null.jsonl", "text|empty|answer"),
            _is("dialogs", "part_null.jsonl", lambda found: "None" not in str(found) or not found),
        ),
    )
    yield (
        "nan",
        "NaN is no text",
        _either(
            _is(
                "dialogs",
                "nan.jsonl",
                lambda found: _answers(found) == ["second"] and "nan" not in str(found).lower(),
            ),
            _refused("dialogs", "nan.jsonl", "nan"),
        ),
    )
    yield (
        "dup",
        "a key given twice is refused, or the last wins",
        _either(_refused("dialogs", "dup.jsonl", "twice"), _learns("dup.jsonl", ["second"])),
    )
    yield (
        "u2028.json",
        "U+2028 ends no line",
        _is(
            "dialogs",
            "u2028.json",
            lambda found: (
                len(found) == 2 and "one\u2028two" in _texts(found[0])[0] + _texts(found[1])[0]
            ),
        ),
    )
    yield (
        "u2028.jsonl",
        "... under either name",
        _is("dialogs", "u2028.jsonl", lambda found: len(found) == 2),
    )
    yield (
        "u16",
        "UTF-16 is read or named",
        _either(
            _is("dialogs", "u16.jsonl", lambda found: len(found) == 1),
            _refused("dialogs", "u16.jsonl", "UTF"),
        ),
    )
    yield (
        "bom",
        "a byte order mark and CRLF are no content",
        _learns("bom.jsonl", ["answer 1", "answer 2"]),
    )
    yield (
        "cat.jsonl.gz",
        "members of one gzip file are read on",
        _is("dialogs", "cat.jsonl.gz", lambda found: len(found) == 2),
    )
    yield (
        "cut.jsonl.gz",
        "a truncated archive is named",
        _refused("dialogs", "cut.jsonl.gz", r"cut\.jsonl\.gz"),
    )
    yield (
        "a.zip",
        "Parquet in a zip is read, or named",
        _either(
            _is("dialogs", "a.zip", lambda found: len(found) > 1),
            _refused("dialogs", "a.zip", "parquet"),
        ),
    )
    yield "b.zip", "a .zst member is read", _is("dialogs", "b.zip", lambda found: len(found) >= 1)
    yield (
        "nq",
        "an answer that is a list is refused by name",
        _refused("dialogs", "nq.jsonl", "answer"),
    )
    yield "humanp", "a prompt that begins with Assistant: is read", _learns("humanp.jsonl", ["ok"])
    yield "pc_conv", "TRL's conversational prompt and completion", _learns("pc_conv.jsonl", ["b"])
    yield (
        "sysmid",
        "a system turn in the middle is named",
        _refused("dialogs", "sysmid.jsonl", "turn 3|system"),
    )
    yield (
        "twouser",
        "two user turns are named",
        _refused("dialogs", "twouser.jsonl", "turn 2|alternate"),
    )
    yield (
        "afirst",
        "an assistant turn first is named",
        _refused("dialogs", "afirst.jsonl", "turn 1|alternate"),
    )
    yield (
        "firstrole",
        "... with its line",
        _refused("dialogs", "firstrole.jsonl", r"firstrole\.jsonl:1"),
    )


def _linked(bench: Bench, folder: str, target: str) -> Path:
    """A copy of a folder of inputs whose file `linked` is a link to another folder."""
    place = bench.scratch / f"{folder}-{target}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bench.inputs / "data" / folder, place)
    (place / "linked").unlink(missing_ok=True)
    (place / "linked").symlink_to(bench.inputs / "data" / target, target_is_directory=True)

    return place


def _folders() -> Iterator[tuple[str, str, Work]]:
    def folder(name: str, target: str, count: int) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _linked(bench, name, target)
            got = bench.llama2(
                "prepare", "--kind", "dialogs", "--sources.s.path", str(place), "--out", "OUT"
            )
            return got.status == 0 and len(
                _kept(got, "dialogs")
            ) == count, f"{got.short()} | {len(_kept(got, 'dialogs'))} records"

        return work

    def texts(name: str, count: int) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _linked(bench, name, "txtelse")
            got = bench.llama2(
                "clean", "--sources.web.path", str(place), "--heldout", "0", "--out", "OUT"
            )
            found = got.records("documents/web.jsonl")

            return got.status == 0 and len(
                found
            ) == count, f"{got.short()} | {len(found)} documents"

        return work

    def globbed(*arguments: str, file: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            got = bench.llama2(
                *[one.replace("GLOB", bench.file("data/gl/*.txt")) for one in arguments],
                "--out",
                "OUT",
            )
            return got.status == 0 and (got.out / file).exists(), got.short()

        return work

    yield (
        "dir",
        "any case, .ndjson and links are read, hidden folders not",
        folder("dir", "elsewhere", 5),
    )
    yield "dir2", "a folder of links alone is read", folder("dir2", "elsewhere", 1)
    yield (
        "dir3",
        "files of a Mac (._name) are left out",
        _is("dialogs", "dir3", lambda found: len(found) == 1),
    )
    yield (
        "dir4",
        "README.txt and dataset_infos.json are no data",
        _is("dialogs", "dir4", lambda found: len(found) == 1),
    )
    yield "txtdir", "clean likewise", texts("txtdir", 3)
    yield "txtonly", "clean likewise, links alone", texts("txtonly", 1)
    yield (
        "gl clean",
        "a glob is a path",
        globbed(
            "clean", "--sources.web.path", "GLOB", "--heldout", "0", file="documents/web.jsonl"
        ),
    )
    yield (
        "docbom",
        "clean reads a byte order mark",
        lambda bench: ok(
            bench.llama2(
                "clean",
                "--sources.web.path",
                bench.file("data/docbom.jsonl"),
                "--heldout",
                "0",
                "--out",
                "OUT",
            ),
            lambda got: (
                got.records("documents/web.jsonl")[0]["text"] == "a good text, long enough to stay."
            ),
        ),
    )
    yield (
        "surrogate_doc",
        "clean names a lone surrogate",
        lambda bench: refusal(
            bench.llama2(
                "clean",
                "--sources.web.path",
                bench.file("data/surrogate_doc.jsonl"),
                "--out",
                "OUT",
            ),
            r"surrogate_doc\.jsonl:1",
        ),
    )

    for name in ("crlf", "em", "nul", "oneline", "th", "zh", "bomtok", "tiny"):
        yield f"{name}.txt", "a tokenizer, or one line that names what is wrong", _tokenizer(name)


def _tokenizer(name: str) -> Work:
    def work(bench: Bench) -> tuple[bool, str]:
        got = bench.llama2(
            "tokenizer",
            "--documents",
            bench.file(f"data/{name}.txt"),
            "--vocab-size",
            "300",
            "--out",
            "OUT",
        )
        return not got.crashed and (got.status == 0 or is_refusal(got, "")), got.short()

    return work
