"""`llama2 <verb> [recipe.yaml] --section.key value`: parse, call, nothing else.

Exit status: 0 done, or stopped by SIGTERM, SIGUSR1 or SIGHUP with everything saved; 1 a defect; 2
something the user can mend (one line says what); 130 ended by Ctrl-C, unfinished. In all of these
but 1 the same command goes on.

Modules that take seconds to import wait until a command is known, and until Ctrl-C has a handler.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence

import llama2
from llama2.errors import UserError, did_you_mean, explain_os_errors
from llama2.interrupts import MESSAGE, STATUS, leave_at_once
from llama2.recipe.verbs import VERBS
from llama2.terminal_text import say

HELP = """usage: llama2 <verb> [recipe.yaml] [--section.key value ...]

The Llama 2 paper as commands, in its order:
{verbs}

  llama2 <verb> --help          every key of a verb, with its default
  llama2 <verb> ... --dry-run   the resolved configuration and what it would cost, without doing it
"""

_HELP_WORDS = ("-h", "--help", "help")
_SPELT = "llama2-spelt"
"""the name of our way to write what a stream cannot"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit status."""
    # what matters of PyTorch's log comes as an exception, in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    _open_closed_streams()
    codecs.register_error(_SPELT, _spell)

    # in the locale C, help and file names could not be printed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = stream.encoding.lower() in ("ascii", "ansi_x3.4-1968")
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors=_SPELT)

    sys.exit(_guarded(list(sys.argv[1:] if arguments is None else arguments)))


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what a stream writes for a character it has not: a byte of a file's name as it is, all
    else by its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _open_closed_streams() -> None:
    """Open what was closed (`llama2 ... <&-`, a service) to nowhere, before a file gets its
    number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            mode = "w" if number else "r"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _guarded(arguments: list[str]) -> int:
    """Carry out a command, and return its exit status whatever it raises but a defect."""
    try:
        with explain_os_errors("output"):
            return _dispatch(arguments)
    except UserError as error:
        say(f"llama2: error: {error}")
        return error.exit_code
    except BrokenPipeError:  # `llama2 ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(MESSAGE, file=sys.stderr)
        return STATUS


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"llama2 {llama2.__version__}")
        return 0

    _refuse_deleted_directory()
    if len(arguments) > 1 and arguments[0] in _HELP_WORDS:  # `llama2 help sft`
        arguments = [arguments[1], "--help"]

    if not arguments or arguments[0] in _HELP_WORDS:
        print(_describe_verbs())
        return 0

    verb, *rest = arguments
    if verb not in VERBS:
        raise _explain_unknown(verb)

    with leave_at_once():
        from llama2.recipe import launch

    return launch.run_command(verb, rest)


def _describe_verbs() -> str:
    """The help of the whole program: every verb with the section of the paper it carries out."""
    lines = [f"  {name:9}  {verb.section:5} {verb.summary}" for name, verb in VERBS.items()]
    return HELP.format(verbs="\n".join(lines))


def _refuse_deleted_directory() -> None:
    """UserError where the working directory has been deleted: libraries that are loaded next would
    end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the directory in which this command is called has been deleted", "go to another one"
        ) from None


def _explain_unknown(verb: str) -> UserError:
    """Return the error for a first word that is no verb."""
    if verb.endswith((".yaml", ".yml")):
        return UserError(f"{verb}: a recipe stands behind a verb", f"write llama2 run {verb}")
    if verb.startswith("-"):
        return UserError(f"a verb stands before all flags ({verb})", "llama2 help lists the verbs")

    return UserError(f"unknown verb '{verb}'", did_you_mean(verb, VERBS))


if __name__ == "__main__":
    main()
