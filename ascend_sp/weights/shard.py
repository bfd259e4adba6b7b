"""``shard_weights``: each rank keeps its part of every weight, and compiled programs gather it.

A sharded parameter is a `DTensor`, as after PyTorch's FSDP2, with the same name and shape. In code
that is being compiled, reading it yields the whole tensor, by an all-gather in the graph (as in
SimpleFSDP, arXiv 2411.00284); so the compiler's scheduler hides it like every other collective.
Elsewhere reading it yields the DTensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ascend_sp.runtime import guards, kept, replicas
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.topology import device_type_of, mesh_of, resolve
from ascend_sp.runtime.units import mib

_STEP = guards.Step.named("shards its weights")
_TIMEOUT = 300.0


@dataclass(frozen=True)
class WeightsReport:
    """What `shard_weights` did; print it for a summary."""

    ranks: int
    """P: ranks that share the weights."""
    whole_bytes: int
    """Bytes of all parameters."""
    local_bytes: int
    """Bytes of parameters that this rank holds now."""
    room: int
    """Bytes that compiled programs may hold besides, to keep weights whole."""
    largest: tuple[int, ...]
    """Bytes of the two largest parameters that are gathered, the largest first."""
    sharded: tuple[str, ...]
    """Names of the parameters of which each rank holds a part."""
    whole: tuple[tuple[str, str], ...]
    """Names of those that every rank holds whole, and why."""

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.whole:
            reasons.setdefault(why, []).append(name)
        lines = [
            f"{self.ranks} rank(s); weights in MiB: {mib(self.whole_bytes)} in all, "
            f"{mib(self.local_bytes)} on this rank. {len(self.sharded)} parameters are gathered "
            f"when they are needed, of at most {mib(max(self.largest, default=0))} each."
        ]
        if self.room:
            lines.append(f"  Compiled programs may keep {mib(self.room)} more, of their choice.")
        for why, names in reasons.items():
            lines.append(
                f"  whole  {names[0]}{', ...' if len(names) > 1 else ''} ({len(names)}): {why}"
            )
        return "\n".join(lines)


@dataclass
class _Weight:
    """One parameter, with all places where it is."""

    value: nn.Parameter
    names: list[str]
    dim: int
    """The dim that is split; -1 if it stays whole."""
    why: str = ""
    """Why it stays whole."""


def shard_weights(
    model: nn.Module, mesh: DeviceMesh | None = None, *, budget: int | float | None = None
) -> WeightsReport:
    """Keep a part of each weight on each rank, in place; compiled programs gather the rest.

    The model must then be called through ``torch.compile(model, backend="ascend_sp")`` (or any
    other compile that takes DTensors): each weight is gathered early enough to hide behind compute
    and freed after its last use. Every rank calls this, with the same weights.

    A parameter is split along its first dim that the number of ranks divides; one without such a
    dim stays whole, as do quantised weights. Adapters
    (LoRA) may be loaded before or after, and stay as they are; weights must be fused before. A
    `state_dict` holds DTensors under the usual names: `DTensor.full_tensor` makes one whole.

    Args:
        model: any module, with whole weights. Parameters on ``meta`` stay there; `load_weights`
            then reads this rank's part of each.
        mesh: 1-D, or with a dim named ``"sp"``; None takes all ranks. Without a process group, or
            on one rank, nothing is changed.
        budget: how much of the weights a rank may hold between steps: bytes, or as a float a share
            of the model's. Within it the compiled programs keep weights whole, gathered in their
            first run: those first that the device would wait for by estimate. None keeps none.

    Returns:
        What is sharded, what is not and why, and the bytes.

    Raises:
        ConfigError: a bad budget, one below the least possible, or a model that is sharded already.
        TopologyError: the mesh does not fit.
        RankMismatchError: the ranks do not shard the same weights in the same way.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"shard_weights takes a torch.nn.Module, and got {type(model).__name__}. Pass the "
            "model itself, such as pipe.transformer."
        )
    model = not_compiled(model)
    weights = _weights(model)
    device = device_type_of(model)
    topology = resolve(None, mesh, device)
    size = topology.size
    # First, so that what is wrong on one rank only is an error on all: the rest follows from this.
    guards.agree(topology, {"budget": repr(budget), "weights": _digest(weights)}, _TIMEOUT, _STEP)
    if any(isinstance(w.value, DTensor) for w in weights):
        raise ConfigError(
            f"{type(model).__name__} is sharded already: it holds DTensors. Call shard_weights "
            "once, on a model with whole weights."
        )
    for w in weights:
        _choose(w, size)
    total = sum(w.value.nbytes for w in weights)
    least = sum(_held(w, size) for w in weights)
    room = room_for(budget, total, least, size)
    if size > 1:
        held = [w for w in weights if not w.value.is_meta]
        which = [replicas.Input(w.names[0], parameter=True) for w in held]
        replicas.compare(topology, "shard_weights", which, [w.value for w in held], _TIMEOUT)
        along = mesh_of(mesh, device)
        for w in weights:
            if w.dim >= 0:
                _shard(model, w, along, topology.rank)
        kept.allow(model, room)
        model.register_forward_pre_hook(_only_compiled)
    return WeightsReport(
        ranks=size,
        whole_bytes=total,
        local_bytes=sum(_held(w, size) for w in weights),
        room=room if size > 1 else 0,
        largest=tuple(sorted((w.value.nbytes for w in weights if w.dim >= 0), reverse=True)[:2]),
        sharded=tuple(n for w in weights if w.dim >= 0 for n in w.names),
        whole=tuple((n, w.why) for w in weights if w.dim < 0 for n in w.names),
    )


def _weights(model: nn.Module) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(value), _Weight(value, [], -1)).names.append(name)
    return list(found.values())


def _choose(w: _Weight, ranks: int) -> None:
    """The dim along which a parameter is split, or why it is not."""
    if ranks == 1:
        w.why = "there is one rank"
    elif type(w.value.data) is not Tensor:
        w.why = f"it is a {type(w.value.data).__name__}, of a class of its own"
    else:
        w.dim = split_dim(w.value.shape, ranks)
        w.why = f"none of its sizes divides by {ranks}" if w.dim < 0 else ""


def split_dim(shape: Sequence[int], ranks: int) -> int:
    """The first dim of a parameter that `ranks` divides; -1 if there is none."""
    return next((d for d, n in enumerate(shape) if n and n % ranks == 0), -1)


def bytes_held(model: nn.Module, ranks: int) -> tuple[int, int]:
    """Bytes of all parameters, and the least that each of `ranks` can hold of them."""
    weights = _weights(model)
    for w in weights:
        _choose(w, ranks)
    return sum(w.value.nbytes for w in weights), sum(_held(w, ranks) for w in weights)


def _held(w: _Weight, ranks: int) -> int:
    """Bytes that a rank holds."""
    return w.value.nbytes if w.dim < 0 else w.value.nbytes // ranks


def room_for(budget: int | float | None, total: int, least: int, ranks: int) -> int:
    """Bytes that a budget leaves for weights that stay whole, besides the parts.

    Args:
        budget: see `shard_weights`.
        total: bytes of the model.
        least: bytes of it that a rank holds at least.
        ranks: P.

    Raises:
        ConfigError: a bad budget, or one below the least.
    """
    if budget is None:
        return 0
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ConfigError(
            f"budget is {budget!r}; it must be a number of bytes, or as a float a share of the "
            "model's, above 0."
        )
    if isinstance(budget, float) and budget > 1:
        raise ConfigError(
            f"budget is {budget!r}: as a float it is a share of the model's bytes, at most 1.0. "
            f"Pass int({budget!r}) for bytes."
        )
    limit = int(budget * total) if isinstance(budget, float) else budget
    if least > limit:
        raise ConfigError(
            f"budget is {limit} bytes of weights on a rank, but the least that {ranks} rank(s) can "
            f"hold of this model's {total} is {least}. Raise it, or take more ranks."
        )
    return limit - least


def _digest(weights: Sequence[_Weight]) -> str:
    """Names, sizes and classes of all parameters, in a few words."""
    rows = [
        (w.names, tuple(w.value.shape), str(w.value.dtype), type(w.value.data).__name__)
        for w in weights
    ]
    text = repr(rows)
    split = sum(isinstance(w.value, DTensor) for w in weights)
    already = f", {split} of them sharded already" if split else ""
    return f"{len(weights)} parameters{already}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _shard(model: nn.Module, w: _Weight, mesh: DeviceMesh, rank: int) -> None:
    whole = w.value.detach()
    each = whole.shape[w.dim] // mesh.size()
    mine = whole.narrow(w.dim, rank * each, each)
    # A copy, so that the whole can be freed.
    local = mine.clone(memory_format=torch.contiguous_format)
    stride = torch.empty(whole.shape, device="meta").stride()
    value = DTensor.from_local(
        local, mesh, [Shard(w.dim)], run_check=False, shape=whole.shape, stride=stride
    )
    new = nn.Parameter(value, requires_grad=w.value.requires_grad)
    for name in w.names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = new
        module.__class__ = _reading_whole(type(module), leaf)
    w.value = nn.Parameter(whole.new_empty(whole.shape, device="meta"), w.value.requires_grad)


_kinds: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _reading_whole(kind: type[nn.Module], leaf: str) -> type[nn.Module]:
    """`kind`, in which compiled code that reads the parameter `leaf` gathers it; one class each."""
    if (kind, leaf) in _kinds:
        return _kinds[kind, leaf]

    def read(self: nn.Module) -> Any:
        value = self._parameters[leaf]
        if torch.compiler.is_compiling() and isinstance(value, DTensor):
            return _whole(value)
        return value

    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made = _kinds[kind, leaf] = type(kind.__name__, (kind,), {**own, leaf: property(read)})
    return made


def _whole(value: DTensor) -> Tensor:
    """All of `value`, which is sharded along one dim; for code that is being compiled."""
    return value.redistribute(placements=[Replicate()]).to_local()


def _only_compiled(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        raise ConfigError(
            f"the weights of {type(model).__name__} are sharded, and whole in compiled programs "
            'only. Call torch.compile(model, backend="ascend_sp") instead.'
        )
