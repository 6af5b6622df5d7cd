"""Files as memory maps that hold no file descriptor.

Systems allow a process 256 to 1,024 descriptors, and a feature set may have thousands of files. A map outlives the
descriptor that it was made from, but Python's `mmap` keeps a duplicate of it (until 3.13, which has `trackfd=False`).
So the C function is called here.
"""

import ctypes
import mmap
import os
from typing import BinaryIO

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class _Map:
    """The owner of a map, which NumPy keeps alive as long as an array refers to it."""

    def __init__(self, descriptor: int, size: int, writable: bool) -> None:
        self._size = size
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._address = _mmap(None, size, protection, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.__array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (self._address, not writable),
        }

    def __del__(self, unmap=_munmap, failed=_FAILED) -> None:  # type: ignore[no-untyped-def]  # kept until the end
        if self._address != failed:
            unmap(self._address, self._size)


def whole(stream: BinaryIO, writable: bool = False) -> np.ndarray:
    """Map an open file, which may then be closed, and return its bytes, uint8 (size,).

    It is unmapped when the last array that refers to it is garbage-collected. Reading beyond the end of a file that has
    become shorter kills the process. `writable` bytes can be changed, and the file with them; it must be open for both.

    Raises:
        OSError: The file is empty, or the system refused.
    """
    descriptor = stream.fileno()
    return np.asarray(_Map(descriptor, os.fstat(descriptor).st_size, writable))
