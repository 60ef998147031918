"""Whatever the bytes of a file, a reader gives records or a `UserError`: never another exception,
never a hang."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import shutil
import signal
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from sources import model_of

from llama2 import records
from llama2.chat.keyboard import History
from llama2.data.documents import read_documents
from llama2.errors import UserError
from llama2.formats import checkpoint, gguf, hf, llama2c, meta
from llama2.formats.detect import open_model
from llama2.importers.dialogs import import_dialogs
from llama2.importers.preferences import import_preferences
from llama2.importers.prompts import import_prompts
from llama2.importers.tables import ReadOptions
from llama2.model.llama import LlamaConfig
from llama2.records import Dialog, Document, Preference, Prompt
from llama2.runs import completion
from llama2.serve import request_body
from llama2.serve.errors import ApiError
from llama2.serve.schema import ChatRequest, CompletionRequest
from llama2.tally import Tally
from llama2.terminal_text import LONGEST
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.tokenizer import Tokenizer

MUTATIONS, SECONDS = 500, 10
ROWS = [
    [
        {"text": "A document of the mill, built in 1746."},
        {"text": "Ein Müller \U0001f600", "id": 7, "score": 0.5},
    ],
    [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello.\r\n"},
            ]
        }
    ]
    * 3,
    [
        {"instruction": 'Say "hi"', "input": "now,\nor never", "output": "hi"},
        {"instruction": "a", "output": "b"},
    ],
    [
        {"prompt": "Spell cat.", "chosen": "c-a-t", "rejected": "k-a-t"},
        {"prompt": "x", "chosen": "y", "rejected": "z"},
    ],
    [{"messages": [{"role": "user", "content": "How?"}], "id": "p", "safety": True}],
    [
        {
            "id": "c",
            "prompt": [{"role": "user", "content": "Hi"}],
            "responses": [{"text": "a"}, {"text": "b"}],
            "preferred": 1,
            "degree": "better",
        }
    ],
]
FIXTURES = Path(__file__).parent.parent / "fixtures" / "import"
FORMATS = [
    [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    for file in sorted(FIXTURES.glob("*.jsonl"))
]
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift-jis",
    "utf-7",
]


def as_table(rows, separator):
    def cell(value):
        text = value if isinstance(value, str) else json.dumps(value)
        return (
            '"' + text.replace('"', '""') + '"'
            if set(text) & {'"', separator, "\n", "\r"}
            else text
        )

    names = list(rows[0])
    return "\n".join(
        separator.join(cell(row.get(name, "")) for name in names)
        for row in [dict(zip(names, names)), *rows]
    )


def as_parquet(rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)

    return file.getvalue()


def as_zip(rows):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep/a.jsonl", "\n".join(map(json.dumps, rows)))
        archive.writestr("b.csv", as_table(rows, ","))
        archive.writestr("c.parquet", as_parquet(rows))
        archive.writestr("d.json.gz", gzip.compress(json.dumps(rows).encode()))

    return file.getvalue()


KINDS = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    ".json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False),
    ".csv": lambda rows: as_table(rows, ","),
    ".tsv": lambda rows: as_table(rows, "\t"),
    ".txt": lambda rows: "\n\n".join(str(value) for row in rows for value in row.values()),
    ".parquet": as_parquet,
    ".zip": as_zip,
}
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pytest.importorskip("zstandard").ZstdCompressor().compress(content),
}


def disturbed(chance, value):
    """JSON in which some values are of another type, missing, or more than they should be."""
    if chance.random() < 0.04:
        return chance.choice(
            [
                None,
                True,
                0,
                -1,
                1.5,
                "",
                " ",
                "\0",
                [],
                {},
                [None],
                [[]],
                {"": None},
                [value],
                {"role": value},
            ]
        )
    if isinstance(value, dict):
        return {
            key if chance.random() > 0.02 else key.upper(): disturbed(chance, item)
            for key, item in value.items()
            if chance.random() > 0.02
        }

    return [disturbed(chance, item) for item in value] if isinstance(value, list) else value


def mutated(chance, content):
    """The bytes, damaged: cut, flipped, swapped, overwritten, doubled or with strange ones put
    in."""
    content = bytearray(content)
    for _ in range(chance.randrange(4)):
        place, length = chance.randrange(len(content) + 1), chance.randrange(1, 40)
        match chance.randrange(7):
            case 0:
                del content[place:]
            case 1:
                del content[place : place + length]
            case 2 if place < len(content):
                content[place] ^= 1 << chance.randrange(8)
            case 3:
                other = chance.randrange(len(content) + 1)
                one, two = content[place : place + 4], content[other : other + 4]
                content[place : place + 4], content[other : other + 4] = two, one
            case 4:
                content[place : place + length] = chance.randbytes(length)
            case 5:
                content += content[place : place + 200]
            case _:
                odd = [
                    b"\0",
                    b"\r",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b'"',
                    b"\xe2\x80\xa8",
                    b"\\ud800",
                    b"NaN",
                    b"[" * 3000,
                    b"{",
                    b"9" * 5000,
                    b"null",
                    b"\xed\xa0\x80",
                    b"1e999",
                    b",",
                    b"\t",
                    b"-0",
                ]
                content[place:place] = chance.choice(odd)

    return bytes(content)


def made(chance, folder):
    """A file of some kind, packing, encoding and ending, mostly damaged."""
    kind, packing = chance.choice(list(KINDS)), chance.choice([*PACKINGS, *[""] * 4])
    rows = chance.choice(ROWS)
    if kind in (".json", ".jsonl") and chance.random() < 0.6:
        rows = [disturbed(chance, row) for row in chance.choice(FORMATS)]

    content = KINDS[kind](rows)
    if isinstance(content, str):
        encoding = chance.choice([*ENCODINGS, *["utf-8"] * 9])
        content = content.replace("\n", chance.choice(["\n", "\n", "\r\n", "\r"])).encode(
            encoding, "replace"
        )
        content = mutated(chance, content) if chance.random() < 0.5 else content

    content = PACKINGS[packing](content)
    ending = (
        f"{kind}{packing}"
        if chance.random() < 0.8
        else chance.choice(list(KINDS)) + chance.choice(list(PACKINGS))
    )
    path = folder / f"a{ending.upper() if chance.random() < 0.1 else ending}"
    path.write_bytes(mutated(chance, content) if chance.random() < 0.8 else content)

    return path


READERS = {
    "documents": lambda path, how: read_documents(
        path, split="paragraph", tally=Tally(), malformed=how
    ),
    "dialogs": lambda path, how: import_dialogs(path, ReadOptions(malformed=how), tally=Tally()),
    "prompts": lambda path, how: import_prompts(path, ReadOptions(malformed=how), tally=Tally()),
    "preferences": lambda path, how: import_preferences(
        path, ReadOptions(malformed=how), tally=Tally()
    ),
    **{
        kind.__name__: (lambda path, how, kind=kind: records.read(kind, path, tally=Tally()))
        for kind in (Document, Dialog, Prompt, Preference)
    },
}


def outcome(path, name, how):
    """What a reader makes of a file: the kind of its records, or a refusal of one line."""
    try:
        return type(next(iter(list(READERS[name](path, how))), None)).__name__
    except UserError as error:
        return "refused" if "\n" not in str(error) else pytest.fail(f"{path} as {name}: {error}")
    except Exception as error:
        raise AssertionError(f"{path} as {name}, malformed: {how}") from error


def test_a_damaged_file_gives_records_or_one_clear_line(tmp_path: Path) -> None:
    def hangs(*_):
        raise TimeoutError(f"no end after {SECONDS} seconds")

    earlier = signal.signal(signal.SIGALRM, hangs)
    outcomes = set()
    try:
        for number in range(MUTATIONS):
            path = made(random.Random(number), tmp_path)
            for name, how in itertools.product(READERS, ("stop", "skip")):
                signal.alarm(SECONDS)
                outcomes.add((name, outcome(path, name, how)))
                signal.alarm(0)

            path.unlink()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)

    for name, kind in (
        ("documents", "Document"),
        ("dialogs", "Dialog"),
        ("prompts", "Prompt"),
        ("preferences", "Preference"),
        ("Dialog", "Dialog"),
    ):
        assert {(name, kind), (name, "refused")} <= outcomes


# --- models, runs, requests ---
def models(folder, tokenizer):
    """One small model in every format that is read: the place to open, and the files there."""
    model = model_of(LlamaConfig(tokenizer.vocab_size, 16, 24, 1, 2, 1, max_position_embeddings=32))
    checkpoint.save(model, folder / "hf")
    tokenizer.save(folder / "hf")
    (folder / "hf" / "checksums.json").unlink()
    source = hf.read(folder / "hf")
    tensors = {name: stored.read() for name, stored in source.tensors.items()}

    for name, is_zip in (("zip", True), ("old", False)):
        shutil.copytree(
            folder / "hf", folder / name, ignore=shutil.ignore_patterns("*.safetensors")
        )
        torch.save(
            tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip
        )

    meta.write(source, folder / "meta")
    gguf.write(source, folder / "model.gguf")
    llama2c.write(source, folder / "model.bin")

    return [*(folder / name for name in ("hf", "zip", "old", "meta", "model.gguf", "model.bin"))]


def read_model(place):
    source = open_model(place)
    for stored in source.tensors.values():
        assert stored.read().shape == stored.shape

    if source.tokenizer is not None and source.path.suffix != ".bin":
        loaded = (
            Tokenizer.load(source.path)
            if source.path.is_dir()
            else Tokenizer(sentencepiece_model.read_model(source.tokenizer))
        )
        loaded.decode(loaded.encode("The old mill, built in 1746. \U0001f600"))


def test_a_damaged_model_is_read_or_refused_in_one_clear_line(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    places = models(tmp_path, tokenizer)
    outcomes = Counter()
    for number in range(300):
        chance = random.Random(number)
        place = chance.choice(places)
        file = chance.choice(sorted(place.iterdir())) if place.is_dir() else place
        content = file.read_bytes()

        if file.suffix == ".json" and chance.random() < 0.7:
            damaged = json.dumps(disturbed(chance, json.loads(content))).encode()
        else:
            head = chance.choice([200, 4096, len(content)])
            damaged = mutated(chance, content[:head]) + content[head:]

        file.write_bytes(damaged)
        try:
            read_model(place)
            outcomes[place.name, "read"] += 1
        except UserError as error:
            outcomes[place.name, "refused" if len(str(error)) < LONGEST - 15 else "endless"] += 1
        except Exception as error:
            raise AssertionError(f"{number}: {file}") from error

        file.write_bytes(content)

    for place in places:
        read_model(place)
        assert outcomes[place.name, "refused"], place

    assert {word for _, word in outcomes} == {"read", "refused"}


def test_what_a_run_says_of_itself_is_whole_or_refused(tmp_path: Path, world: Path) -> None:
    """As runs of before wrote it, without a hash of it."""
    read = {"COMPLETE": completion.read_mark, "manifest.json": completion.read_manifest}
    outcomes = set()
    for number in range(300):
        chance = random.Random(number)
        for name in read:
            said = json.loads((world / name).read_text())
            del said["sum"]
            (tmp_path / name).write_text(json.dumps(disturbed(chance, said)))

        for name, reader in read.items():
            try:
                found = reader(tmp_path)
                assert all(isinstance(value, str) for value in found.get("outputs", {}).values())
                outcomes.add((name, "read"))
            except UserError:
                outcomes.add((name, "refused"))

    assert len(outcomes) == 4


ASKED = [
    (
        ChatRequest,
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            "max_tokens": 5,
            "temperature": 0.5,
            "stop": ["a"],
            "seed": 1,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 3,
            "logit_bias": {"5": 1.5},
            "n": 2,
        },
    ),
    (
        ChatRequest,
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "s",
                    "schema": {
                        "type": "object",
                        "properties": {"a": {"type": "string", "enum": ["x"]}},
                        "required": ["a"],
                    },
                },
            },
        },
    ),
    (
        CompletionRequest,
        {"model": "m", "prompt": [[1, 2, 3]], "max_tokens": 4, "echo": True, "logprobs": 2},
    ),
]


def test_a_request_of_any_kind_is_taken_or_refused(tmp_path: Path) -> None:
    outcomes = set()
    for number in range(600):
        chance = random.Random(number)
        kind, asked = chance.choice(ASKED)
        content = json.dumps(disturbed(chance, asked)).encode()

        try:
            request_body.parse_request(
                mutated(chance, content) if chance.random() < 0.3 else content, kind
            )
            outcomes.add((kind, "taken"))
        except ApiError as error:
            outcomes.add((kind, f"refused {error.status}"))

    assert outcomes == {(kind, what) for kind, _ in ASKED for what in ("taken", "refused 400")}


def test_the_history_of_a_terminal_is_passed_over_where_it_is_damaged(tmp_path: Path) -> None:
    content = "".join(json.dumps(text) + "\n" for text in ("hi", "a\nb", "\u00e9")).encode()
    history = History(tmp_path / "history")
    for number in range(300):
        history.path.write_bytes(mutated(random.Random(number), content))
        assert all(isinstance(text, str) and text for text in history.read())
