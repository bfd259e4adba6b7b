"""A serialized GE graph, and its execution op by op."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cannsim.ge import ops as _ops
from cannsim.ge.registry import KERNELS, PROTO_DTYPES, Call, GeError

assert _ops  # registers the kernels

_SOURCES = ("Data", "RefData")
_CONTROL = ":-1"


def _plain(value: Any) -> Any:
    """An attribute as plain Python."""
    which = value.WhichOneof("value")
    if which == "list":
        for kind in ("i", "f", "b", "s", "dt"):
            items = list(getattr(value.list, kind))
            if items:
                return [v.decode(errors="replace") if kind == "s" else v for v in items]
        return []
    if which == "s":
        return value.s.decode(errors="replace")
    if which in ("i", "f", "b", "dt"):
        return getattr(value, which)
    return None  # tensors, graphs: see Op.constant


class Op:
    """One node."""

    def __init__(self, definition: Any) -> None:
        self._definition = definition
        self.type: str = definition.type
        self.name: str = definition.name
        self.inputs: list[str] = [i for i in definition.input if not i.endswith(_CONTROL)]
        """Producers as "name:output"; "" for what is not connected."""
        self.controls: list[str] = [
            i.removesuffix(_CONTROL) for i in definition.input if i.endswith(_CONTROL)
        ]
        """Nodes that must be over before this one starts, without giving it data."""
        self.attrs: dict[str, Any] = {k: _plain(v) for k, v in definition.attr.items()}
        self.outputs: list[tuple[torch.dtype, tuple[int, ...]]] = []
        """Dtype and shape of each output in the latest execution, dry or not."""

    def __repr__(self) -> str:
        return f"{self.type}({self.name})"

    @property
    def input_names(self) -> list[str]:
        """What GE's definition of the op calls its inputs."""
        return [d.name for d in self._definition.input_desc]

    def layout(self, index: int) -> str:
        """The format that an input is declared with, "ND" mostly."""
        return self._definition.input_desc[index].layout

    def constant(self) -> Tensor:
        """The value of a Const."""
        t = self._definition.attr["value"].t
        dtype, shape = PROTO_DTYPES[t.desc.dtype], list(t.desc.shape.dim)
        if not t.data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(t.data), dtype=dtype).reshape(shape)

    def declared(self) -> tuple[torch.dtype, list[int]]:
        """Dtype and shape that a graph input is declared with; -1 is not known."""
        desc = self._definition.output_desc[0]
        return PROTO_DTYPES[desc.dtype], list(desc.shape.dim)


class Graph:
    """One graph of a session."""

    def __init__(self, model: bytes, options: dict[str, str]) -> None:
        from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

        definition = ModelDef()
        definition.ParseFromString(model)
        self.ops = _in_order([Op(d) for d in definition.graph[0].op])
        self.options = options
        self.runs = 0
        self.data = sorted(
            (op for op in self.ops if op.type in _SOURCES), key=lambda op: op.attrs["index"]
        )
        self._missing()

    def types(self) -> Counter:
        """How many ops there are of each type."""
        return Counter(op.type for op in self.ops)

    def find(self, part: str) -> list[Op]:
        """Ops with `part` in their type or name."""
        return [op for op in self.ops if part in op.type or part in op.name]

    @property
    def is_static(self) -> bool:
        return all(n >= 0 for op in self.data for n in op.declared()[1])

    @property
    def output_count(self) -> int:
        return sum(len(op.inputs) for op in self.ops if op.type == "NetOutput")

    def _missing(self) -> None:
        special = (*_SOURCES, "Const", "NetOutput")
        missing = [op for op in self.ops if op.type not in KERNELS and op.type not in special]
        if missing:
            names = ", ".join(f"{op.type} (node {op.name})" for op in missing)
            raise NotImplementedError(
                f"GE ops without a kernel in the CANN simulator: {names}; add them to "
                "tests/cann/cannsim/ge/ops"
            )

    def infer(self) -> list[Tensor]:
        """Outputs of the right shapes and dtypes: an execution on zeros that speaks to nobody."""
        inputs = []
        for op in self.data:
            dtype, shape = op.declared()
            inputs.append(torch.zeros(shape, dtype=dtype))
        return self.execute(inputs, dry=True)

    def execute(self, inputs: Sequence[Tensor], dry: bool = False) -> list[Tensor]:
        """Outputs for these inputs, in the order of NetOutput."""
        if len(inputs) != len(self.data):
            raise GeError(f"the graph has {len(self.data)} inputs, and got {len(inputs)}")
        values: dict[str, Tensor] = {}
        outputs: list[Tensor] = []
        for op in self.ops:
            if op.type in _SOURCES:
                results: Sequence[Tensor] = (inputs[op.attrs["index"]],)
            elif op.type == "Const":
                results = (op.constant(),)
            else:
                args = [values[i] if i else None for i in op.inputs]
                if op.type == "NetOutput":
                    outputs = [a for a in args if a is not None]
                    continue
                results = self._run(op, args, dry)
            op.outputs = [(r.dtype, tuple(r.shape)) for r in results]
            for i, result in enumerate(results):
                values[f"{op.name}:{i}"] = result
        self.runs += not dry
        return outputs

    @staticmethod
    def _run(op: Op, args: Sequence[Tensor | None], dry: bool) -> Sequence[Tensor]:
        call = Call(op, dict(zip(op.input_names, args, strict=False)), dry)
        with _named(op, args):
            results = KERNELS[op.type](call, *args)
        if results is None:
            return ()
        return results if isinstance(results, (tuple, list)) else (results,)


@contextlib.contextmanager
def _named(op: Op, args: Sequence[Tensor | None]) -> Iterator[None]:
    """Errors of a kernel say which node they come from."""
    try:
        yield
    except Exception as e:
        shapes = [None if a is None else (str(a.dtype), tuple(a.shape)) for a in args]
        kind = type(e) if type(e) in (NotImplementedError,) else GeError
        raise kind(f"GE op {op.type} (node {op.name}), inputs {shapes}: {e}") from e


def _in_order(ops: Sequence[Op]) -> list[Op]:
    """Ops sorted so that data and control edges point forward; otherwise as they were."""
    index = {op.name: i for i, op in enumerate(ops)}
    users: list[list[int]] = [[] for _ in ops]
    waits = [0] * len(ops)
    for i, op in enumerate(ops):
        producers = {name.rpartition(":")[0] for name in op.inputs if name} | set(op.controls)
        for producer in producers:
            if producer not in index:
                raise GeError(f"node {op.name} uses {producer}, which the graph does not have")
            users[index[producer]].append(i)
            waits[i] += 1
    if all(u > i for i, found in enumerate(users) for u in found):
        return list(ops)
    ready = deque(i for i, n in enumerate(waits) if n == 0)
    out = []
    while ready:
        i = ready.popleft()
        out.append(ops[i])
        for u in users[i]:
            waits[u] -= 1
            if waits[u] == 0:
                ready.append(u)
    if len(out) != len(ops):
        stuck = [op.name for op, n in zip(ops, waits, strict=True) if n]
        raise GeError(f"the graph has a cycle among {stuck}")
    return out
