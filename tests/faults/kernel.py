"""A child process whose system calls the kernel refuses, with any errno: seccomp filters of Linux, no rights needed."""

import ctypes
import os
import pickle
import platform
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

_NUMBERS = {
    "x86_64": {"openat": 257, "flock": 73, "read": 0, "pread64": 17, "newfstatat": 262},
    "aarch64": {"openat": 56, "flock": 32, "read": 63, "pread64": 67, "newfstatat": 79},
}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of a filter
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # what it returns; the latter with the errno
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2

CAN_REFUSE = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _NUMBERS, reason="needs Linux's seccomp filters"
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse(call: str, errno: int) -> None:
    """Make this system call fail with `errno`, in this process, from now on."""
    number = _NUMBERS[platform.machine()][call]
    instructions = [(_LOAD, 0, 0, 0), (_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno)]
    instructions.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program)) == 0


def in_child(action: Callable[[], Any]) -> Any:
    """Return what `action` returns, or the type and text of its exception, in a fork of this process."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if not child:
        try:
            os.close(reading)
            try:
                found = action()
            except BaseException as error:
                found = (type(error), str(error))
            os.write(writing, pickle.dumps(found))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        found = pickle.loads(stream.read())  # noqa: S301 - our own child's
    os.waitpid(child, 0)
    return found
