"""Finds and loads the simulated CANN libraries, and declares what Python calls in them."""

from __future__ import annotations

import ctypes
import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAIN = "libcannsim.so"
FOLDER = "CANNSIM_LIB_DIR"


class SimulatorMissingError(RuntimeError):
    """The simulated libraries were not built, or not found."""


class SimulatorError(RuntimeError):
    """The simulated device refuses what it was asked to do."""


def folder() -> Path:
    """Where the libraries are: CANNSIM_LIB_DIR, else a folder of LD_LIBRARY_PATH."""
    named = os.environ.get(FOLDER)
    candidates = [named] if named else os.environ.get("LD_LIBRARY_PATH", "").split(":")
    for candidate in candidates:
        if candidate and (Path(candidate) / MAIN).exists():
            return Path(candidate)
    raise SimulatorMissingError(
        f"no {MAIN} in {candidates}: build it with `python tests/cann/build.py --torch-npu SITE "
        f"--out DIR` and set {FOLDER}=DIR"
    )


class Tensor(ctypes.Structure):
    """``cannsim_tensor`` of ge.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        *[(n, ctypes.c_int32) for n in ("dtype", "rank", "placement", "unused")],
        ("dims", ctypes.c_int64 * 16),
    ]


class Summary(ctypes.Structure):
    """``cannsim_summary`` of ge.cpp."""

    _fields_ = [
        ("is_static", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("output", Tensor * 256),
    ]


class CopyCall(ctypes.Structure):
    """``cannsim_copy_call`` of cannsim.h."""

    _fields_ = [
        *[(n, ctypes.c_int32) for n in ("what", "kind", "value", "is_async")],
        ("to", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("stream", ctypes.c_long),
    ]


class HcclCall(ctypes.Structure):
    """``call`` of hccl.c."""

    _fields_ = [
        ("kind", ctypes.c_char_p),
        ("comm", ctypes.c_char_p),
        ("send", ctypes.c_void_p),
        ("recv", ctypes.c_void_p),
        *[
            (n, ctypes.POINTER(ctypes.c_int64))
            for n in ("send_counts", "send_starts", "recv_counts", "recv_starts")
        ],
        ("count", ctypes.c_uint64),
        *[(n, ctypes.c_int32) for n in ("dtype", "op", "peer", "size", "rank")],
        ("stream", ctypes.c_long),
    ]


_int, _long, _text = ctypes.c_int, ctypes.c_long, ctypes.c_char_p
ORDER_HOOK = ctypes.CFUNCTYPE(None, _int, _long, _long)
COPY_HOOK = ctypes.CFUNCTYPE(None, ctypes.POINTER(CopyCall))
GRAPH_HOOK = ctypes.CFUNCTYPE(_int, _int, _long, _long)
HCCL_HOOK = ctypes.CFUNCTYPE(_int, ctypes.POINTER(HcclCall))
GE_ADD = ctypes.CFUNCTYPE(
    _int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, _text, ctypes.POINTER(Summary)
)
GE_RUN = ctypes.CFUNCTYPE(
    _int,
    ctypes.c_uint32,
    _long,
    _int,
    ctypes.POINTER(Tensor),
    _int,
    ctypes.POINTER(Tensor),
)
GE_REMOVE = ctypes.CFUNCTYPE(_int, ctypes.c_uint32)


@functools.cache
def load() -> ctypes.CDLL:
    """The main library, with all that stand in for CANN's loaded before it is needed.

    Loaded by path and for all to see, so that the wheel's libraries find them by name: neither
    LD_LIBRARY_PATH nor an early decision of whoever started the process is needed.
    """
    where = folder()
    lib = ctypes.CDLL(str(where / MAIN), mode=ctypes.RTLD_GLOBAL)
    for path in sorted(where.glob("lib*.so")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    lib.cannsim_allocate.restype = ctypes.c_void_p
    lib.cannsim_allocate.argtypes = [ctypes.c_uint64]
    lib.cannsim_stub_name.restype = _text
    lib.cannsim_set_error.argtypes = [_text]
    lib.cannsim_error.restype = _text
    lib.cannsim_find_communicator.argtypes = [
        _text,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
    ]
    lib.aclrtStreamGetId.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)]
    return lib


_hooks: list[Any] = []  # ctypes does not keep callbacks alive


def set_hooks(setter: str, *hooks: Any) -> None:
    """Give C the functions to call; they live as long as the process."""
    _hooks.extend(hooks)
    getattr(load(), setter)(*hooks)


def clear_hooks() -> None:
    """C stops calling Python. For the end of the process: its threads may outlive Python."""
    lib = load()
    for setter in ("order", "copy", "graph", "hccl"):
        getattr(lib, f"cannsim_set_{setter}_hook")(None)
    lib.cannsim_set_ge_hooks(None, None, None)


def reports_errors(fn: Callable[..., None]) -> Callable[..., int]:
    """`fn` as C calls it: 0, or 1 and the error's text where aclGetRecentErrMsg finds it."""

    @functools.wraps(fn)
    def called(*args: Any) -> int:
        try:
            fn(*args)
        except BaseException as e:
            if os.environ.get("CANNSIM_VERBOSE"):
                traceback.print_exc()
            load().cannsim_set_error(f"{type(e).__name__}: {e}".encode())
            return 1
        return 0

    return called


def last_error() -> str:
    """What aclGetRecentErrMsg says."""
    return load().cannsim_error().decode()


def called_stubs() -> list[str]:
    """Names without a body that have been called in this process."""
    lib = load()
    return [
        lib.cannsim_stub_name(i).decode()
        for i in range(lib.cannsim_stubs())
        if lib.cannsim_stub_was_called(i)
    ]
