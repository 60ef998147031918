"""The operating system's refusals become one line; what is not about a path passes."""

import errno
import os

import pytest

from llama2.errors import UserError, explain_os_errors


def refuse(error):
    with explain_os_errors("here"):
        raise error


@pytest.mark.parametrize(("number", "line"), [
    (errno.ENOSPC, "here: no space left on the device; free some space and run the same command again: it resumes"),
    (errno.EIO, "here: input/output error; check the path and its disk"),
    (errno.ENAMETOOLONG, "here: this name is too long for the file system; choose a shorter one"),
    (errno.ELOOP, "here: symbolic links that lead in a circle; mend the links, or name another path"),
])
def test_every_refusal_about_a_path_is_one_line(number, line):
    with pytest.raises(UserError) as error:
        refuse(OSError(number, os.strerror(number)))
    assert str(error.value) == line


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EBADF, "x"),
                                   ConnectionRefusedError(errno.ECONNREFUSED, "x")])
def test_what_is_not_about_a_path_passes(error):
    with pytest.raises(type(error)) as passed:
        refuse(error)
    assert passed.value is error
