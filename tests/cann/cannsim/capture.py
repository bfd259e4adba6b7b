"""ACL graphs: what runs while one is captured is recorded, and replayed on the same memory.

Kernels do run during the capture, since CPU ops need values to run on (indices, say); at its end
everything that they changed is put back, as capturing on a device computes nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from cannsim import library, memory, trace

_BEGIN, _END, _EXECUTE, _DESTROY = range(4)
_ORDER = {
    0: (trace.RECORD, "record"),
    1: (trace.WAIT, "wait"),
    2: (trace.SYNC, "stream"),
    3: (trace.SYNC, "event"),
    4: (trace.SYNC, "device"),
}
_H2D, _D2H = 1, 2

_capturing: int | None = None
_before: list[tuple[Tensor, Tensor]] = []  # device memory and what it held


def capturing() -> bool:
    """Whether an ACL graph is being captured."""
    return _capturing is not None


def refuse(what: str) -> None:
    """Raise, as a device would, if `what` needs the host to wait while a graph is captured."""
    if capturing():
        raise library.SimulatorError(
            f"{what} makes the host wait for the device, which is not allowed while an ACL graph "
            "is captured"
        )


def will_write(*tensors: Tensor) -> None:
    """CPU aliases that are about to be written; their contents come back when a capture ends."""
    if capturing():
        _before.extend((t, t.clone()) for t in tensors if t.numel())


def _on_graph(what: int, graph: int, stream: int) -> None:
    global _capturing
    if what == _BEGIN:
        _capturing = graph
        trace.begin_capture(graph)
    elif what == _END:
        trace.end_capture(graph)
        _capturing = None
        for t, held in reversed(_before):
            t.copy_(held)
        _before.clear()
    elif what == _EXECUTE:
        ops = trace.captured(graph).ops
        if trace.active():
            reads = [r for op in ops for r in op.reads]
            writes = [r for op in ops for r in op.writes]
            name = f"ACL graph {graph}"
            trace.emit(trace.Op(trace.KERNEL, name, stream, reads, writes))
        for op in ops:
            if op.replay is not None:
                op.replay()
    else:
        trace.destroyed(graph)


def _on_order(what: int, event: int, stream: int) -> None:
    kind, name = _ORDER[what]
    trace.emit(trace.Op(kind, name, stream, event=event))


def _on_copy(pointer: Any) -> None:
    if not trace.active():
        return
    call = pointer[0]
    to, source, nbytes = call.to, call.source, call.bytes
    is_set, value = bool(call.what), call.value
    reads = [trace.Region.range(source, nbytes)] if not is_set and call.kind != _H2D else []
    writes = [trace.Region.range(to, nbytes)] if call.kind != _D2H else []

    def replay() -> None:
        if is_set:
            ctypes.memset(to, value, nbytes)
        else:
            ctypes.memmove(to, source, nbytes)

    name = "aclrtMemset" if is_set else "aclrtMemcpy"
    trace.emit(
        trace.Op(
            trace.MEMCPY,
            name,
            call.stream,
            [r for r in reads if r],
            [r for r in writes if r],
            replay=replay,
        )
    )


def current_stream() -> int:
    """The id of the stream that kernels go to now."""
    import torch_npu

    pointer = torch_npu.npu.current_stream().npu_stream
    if not pointer:
        return 0
    out = ctypes.c_int32(0)
    library.load().aclrtStreamGetId(pointer, ctypes.byref(out))
    return out.value


def tensors_in(values: Any) -> list[Tensor]:
    """Device tensors among the arguments of an op."""
    from torch.utils._pytree import tree_leaves

    return [v for v in tree_leaves(values) if memory.on_device(v)]


def install() -> None:
    """Connect to the runtime."""
    library.set_hooks("cannsim_set_graph_hook", library.GRAPH_HOOK(
        library.reports_errors(_on_graph)))  # fmt: skip
    library.set_hooks("cannsim_set_order_hook", library.ORDER_HOOK(_on_order))
    library.set_hooks("cannsim_set_copy_hook", library.COPY_HOOK(_on_copy))
