"""The operating system's refusals become one line; what is not about a path passes."""

import errno
import os

import pytest

from llama2.errors import UserError, explain_os_errors


def refuse(error):
    with explain_os_errors("here"):
        raise error


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (
            errno.ENOSPC,
            "here: no space left on the device; free some space and run the same command again: it resumes",
        ),
        (errno.EIO, "here: input/output error; check the path and its disk"),
        (
            errno.ENAMETOOLONG,
            "here: this name is too long for the file system; choose a shorter one",
        ),
        (
            errno.ELOOP,
            "here: symbolic links that lead in a circle; mend the links, or name another path",
        ),
    ],
)
def test_every_refusal_about_a_path_is_one_line(number, line):
    with pytest.raises(UserError) as error:
        refuse(OSError(number, os.strerror(number)))

    assert str(error.value) == line


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "x"),
        OSError(errno.EBADF, "x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "x"),
    ],
)
def test_what_is_not_about_a_path_passes(error):
    with pytest.raises(type(error)) as passed:
        refuse(error)

    assert passed.value is error


def test_a_link_to_nowhere_is_no_file_in_the_way(tmp_path):
    link = tmp_path / "run"
    link.symlink_to("/none/disk")
    with pytest.raises(UserError) as error, explain_os_errors(link):
        link.mkdir(exist_ok=True)

    assert str(error.value) == (
        f"{link}: a link to /none/disk, which is not there; bring back what it leads to (is "
        "its disk mounted?), or delete the link"
    )
    link.unlink()
    link.write_text("mine")

    with (
        pytest.raises(UserError, match="run: a file of this name exists; choose another"),
        explain_os_errors(link),
    ):
        link.mkdir(exist_ok=True)
