"""Eager npu kernels: every op runs as the CPU's, on CPU aliases of its npu arguments.

The wheel's own kernels would call aclnn kernels, which only CANN has.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cannsim import capture, npu_ops, trace
from cannsim.memory import alias, on_device, to_cpu

# Ops that allocate, or describe a tensor: the wheel's own work without a device.
NATIVE = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty_strided",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::resize_",
    "aten::record_stream",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::_has_compatible_shallow_copy_type",
    "aten::is_set_to",
    "aten::contiguous",
    "aten::stride.int",
    "aten::size.int",
    "npu::get_npu_format",
    "npu::get_storage_size",
    "npu::npu_change_data_ptr",
    "npu::_npu_fused_infer_attention_score_infer_output",
    "npu::_npu_fused_infer_attention_score_v2_infer_output",
    "npu::_npu_fusion_attention_v3_infer_output",
}
# Ops that write to an argument although their schema does not say so, by its position.
WRITES = {"aten::_copy_from": [1], "aten::_copy_from_and_resize": [1]}


def _copy_and_resize(source: Tensor, target: Tensor) -> Tensor:
    """What an op that falls back to the CPU does with its results."""
    return target.resize_(source.shape).copy_(source)


RUNS = {
    "aten::_copy_from": lambda source, target, non_blocking=False: target.copy_(source),
    "aten::_copy_from_and_resize": _copy_and_resize,
}
"""Ops that have no kernel for CPUs."""

_libraries: dict[str, torch.library.Library] = {}


def _written(op: Any) -> list[int]:
    schema = op._schema
    hidden = WRITES.get(op.name().removesuffix(".default"), [])
    return sorted(
        {i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write}
        | set(hidden)
    )


def _makes_a_view(op: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)


def _returns_values(op: Any) -> bool:
    """The result is a number, which is known only when the device is done."""
    returns = op._schema.returns
    return bool(returns) and all("Tensor" not in str(r.type) for r in returns)


def _size_by_value(op: Any, args: Any) -> bool:
    """The result's size is known only when the device is done."""
    if torch.Tag.dynamic_output_shape not in op.tags:
        return False
    if op.name() == "aten::index.Tensor":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return True


def _first_rows(values: Any) -> Any:
    """The same with all indices zero."""
    integers = (torch.int32, torch.int64)
    return tree_map(
        lambda x: torch.zeros_like(x) if isinstance(x, Tensor) and x.dtype in integers else x,
        values,
    )


class _Kernel:
    """One op on npu tensors."""

    def __init__(self, op: Any, run: Callable[..., Any]) -> None:
        self.op, self.run = op, run
        self.name = op.name()
        self.written = _written(op)
        self.returns_values = _returns_values(op)
        self.arguments = [a.name for a in op._schema.arguments]

    def _written_arguments(self, args: Any, kwargs: Any) -> list[Any]:
        out = []
        for i in self.written:
            if i < len(args):
                out.append(args[i])
            elif self.arguments[i] in kwargs:
                out.append(kwargs[self.arguments[i]])
        return tree_leaves(out)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = capture.tensors_in((args, kwargs))
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        written = self._written_arguments(args, kwargs)
        host_written = any(isinstance(w, Tensor) and not on_device(w) for w in written)
        waits = self.returns_values or to_host or host_written or _size_by_value(self.op, args)
        if inputs and waits:
            capture.refuse(self.name)
        cpu_args, cpu_kwargs = to_cpu((args, kwargs))
        if cpu_kwargs.get("pin_memory"):
            cpu_kwargs["pin_memory"] = False
        cpu_written = self._written_arguments(cpu_args, cpu_kwargs)
        capture.will_write(*(c for w, c in zip(written, cpu_written, strict=True) if on_device(w)))
        run = functools.partial(self.run, *cpu_args, **cpu_kwargs)
        try:
            result = run()
        except IndexError:
            if not capture.capturing():
                raise
            # A device computes nothing here: inputs are filled before the first replay, and until
            # then indices may be anything.
            result = self.run(*_first_rows(cpu_args), **_first_rows(cpu_kwargs))
        resized = self._give_back_sizes(written, cpu_written)
        back = {id(c): w for w, c in zip(written, cpu_written, strict=True)}
        fresh: list[Tensor] = []
        finish: list[tuple[int, Tensor]] = []

        def to_device(position: int, t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if id(t) in back:
                return back[id(t)]
            if to_host:
                return t
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="npu")
            memory = alias(made)
            memory.copy_(t)
            fresh.append(made)
            finish.append((position, memory))
            return made

        positions = iter(range(len(tree_leaves(result))))
        out = tree_map(lambda t: to_device(next(positions), t), result)
        if trace.active():
            self._emit(inputs, [w for w in written if on_device(w)], fresh, run, finish, resized)
        return out

    @staticmethod
    def _give_back_sizes(written: list[Any], cpu: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """``out=`` arguments may have been resized, which leaves device memory; go back to it."""
        resized = []
        for w, c in zip(written, cpu, strict=True):
            if on_device(w) and c.shape != w.shape:
                w.resize_(c.shape)
                memory = alias(w)
                memory.copy_(c)
                resized.append((memory, c))
        return resized

    def _emit(
        self,
        inputs: list[Tensor],
        written: list[Tensor],
        fresh: list[Tensor],
        run: Callable[[], Any],
        finish: list[tuple[int, Tensor]],
        resized: list[tuple[Tensor, Tensor]],
    ) -> None:
        if not (inputs or written or fresh):
            return

        def replay() -> None:
            results = tree_leaves(run())
            for position, memory in finish:
                memory.copy_(results[position])
            for memory, c in resized:
                memory.copy_(c)

        trace.emit(
            trace.Op(
                trace.KERNEL,
                self.name,
                capture.current_stream(),
                trace.regions(inputs),
                trace.regions([*written, *fresh]),
                replay=replay,
            )
        )


def _missing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no CPU reference in the CANN simulator; add one to "
            "tests/cann/cannsim/npu_ops.py"
        )

    return refuse


def _overload(name: str) -> Any:
    namespace, rest = name.split("::")
    packet, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet)
    return getattr(packet, overload or "default")


def install() -> int:
    """Replace the wheel's kernels; how many were replaced."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each kernel that is overridden
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            namespace = name.split("::")[0]
            if namespace not in ("aten", "npu", "atb") or name in NATIVE:
                continue
            try:
                op = _overload(name)
            except AttributeError:
                continue  # a registration without an op: a leftover of another PyTorch
            reference: Callable[..., Any] | None = npu_ops.REFERENCES.get(name)
            if reference is None and namespace == "aten":
                reference = RUNS.get(name, op)
            if _makes_a_view(op) and name not in npu_ops.REFERENCES:
                continue
            if namespace not in _libraries:
                _libraries[namespace] = torch.library.Library(namespace, "IMPL")
            kernel = _Kernel(op, reference) if reference else _missing(name)
            _libraries[namespace].impl(op, kernel, "PrivateUse1", allow_override=True)
            count += 1
    return count
