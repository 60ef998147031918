"""A chat with a model that repeats what it hears, to be run at a pseudo-terminal; see
`test_terminal.py`.

Arguments: a file to which every question is appended as a line of JSON, and "plain" for input
without prompt_toolkit.
"""

import fcntl
import json
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from llama2.chat import keyboard, terminal
from llama2.generate.sampling import Sampling
from llama2.records import Messages


class Parrot:
    """Repeats; "slow" is answered word by word until somebody interrupts."""

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        with open(sys.argv[1], "a") as file:
            file.write(json.dumps([turn.content for turn in messages]) + "\n")

        if messages[-1].content != "slow":
            yield f"heard **{len(messages)}**"
            return

        while True:
            yield "word "
            time.sleep(0.02)


class Meter:
    """Says that an answer is complete, where others say how fast it was."""

    def __str__(self) -> str:
        return "complete"


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
    # tests in the background inherit that it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "plain" in sys.argv:
        keyboard._open_prompt_toolkit = keyboard._open_readline
    history = keyboard.History(keyboard.History.default())
    terminal.chat(Parrot(), Sampling(), meter=Meter(), history=history)  # type: ignore[arg-type]
    print(f"left {Path(sys.argv[1]).name}")
