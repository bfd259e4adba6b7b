"""``parallelize_text_encoder``: split an encoder's weights over the ranks, in place."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ascend_sp.runtime import guards
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.errors import TextEncoderError
from ascend_sp.runtime.topology import SINGLE, Topology, device_type_of, mesh_of, resolve
from ascend_sp.text_encoder.find import find, is_excluded
from ascend_sp.text_encoder.proof import Proof
from ascend_sp.text_encoder.report import TextEncoderReport, held_bytes, make_report
from ascend_sp.text_encoder.split import Piece, piece_of
from ascend_sp.text_encoder.structure import Found
from ascend_sp.text_encoder.vocabulary import (
    CUT,
    ROWS,
    Vocabulary,
    find_vocabularies,
    parallelize,
)
from ascend_sp.text_encoder.watch import watch

_STEP = guards.Step.named("splits its text encoder")
_TIMEOUT = 300.0


@dataclass
class Record:
    """What is known of a parallelized encoder, for loading its weights."""

    topology: Topology = SINGLE
    mesh: DeviceMesh | None = None
    pieces: dict[str, Piece] = field(default_factory=dict)
    """What this rank holds of each parameter that is split, by full name."""


_records: WeakKeyDictionary[nn.Module, Record] = WeakKeyDictionary()


def record_of(encoder: nn.Module) -> Record:
    """The record of `encoder`; that of one rank if it was never parallelized.

    A module whose parameters are evenly sharded DTensors of one mesh, as `shard_weights` leaves
    them, has one too.
    """
    return _records.get(encoder) or _of_dtensors(encoder)


def _of_dtensors(module: nn.Module) -> Record:
    pieces, meshes = {}, set[DeviceMesh]()
    for name, p in module.named_parameters(remove_duplicate=False):
        if isinstance(p, DTensor) and len(p.placements) == 1 and p.placements[0].is_shard():
            dim = p.placements[0].dim  # type: ignore[attr-defined]
            each = p.to_local().shape[dim]
            start = p.device_mesh.get_local_rank() * each
            pieces[name] = Piece(dim, ((start, each),), tuple(p.shape))
            meshes.add(p.device_mesh)
    if len(meshes) != 1:
        return Record()
    mesh = meshes.pop()
    return Record(resolve(None, mesh, mesh.device_type), mesh, pieces)


def encoder_is_running() -> bool:
    """Whether the caller was called, however deep, by an encoder whose weights are split."""
    frame = sys._getframe() if _records else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and not_compiled(caller) in _records:
            return True
        frame = frame.f_back
    return False


def parallelize_text_encoder(
    encoder: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    exclude: Sequence[str] = (),
    verify: bool = True,
) -> TextEncoderReport:
    """Split the weights of a text encoder over the ranks, in place.

    Tensor parallelism as in Megatron-LM (arXiv 1909.08053) with PyTorch's `ColwiseParallel` and
    `RowwiseParallel`; attention is split by heads. The pairs of projections are found from shapes
    and from integer attributes such as ``num_heads``; there is no plan per class. Heads and
    features that do not divide are padded with zeros, so that all ranks have the same shapes.

    Every rank calls this, and later calls the encoder with the same inputs: whole tensors in, the
    same whole tensors out on every rank. Attention weights and K/V caches, if the encoder returns
    them, hold the rank's own heads. Inference only.

    A pair that is found is a hypothesis. On the encoder's first call one module of each kind is
    compared with its whole, on that call's inputs and random weights; the call runs eagerly, also
    under `torch.compile`. With ``fullgraph=True`` make one call before compiling.

    Args:
        encoder: any module, of any dtype, whole. Parameters on ``meta`` stay there, see
            `load_text_encoder`.
        mesh: 1-D, or with a dim named ``"sp"``; None takes all ranks. Without a process group, or
            on one rank, nothing is changed; if a launcher started several processes and they have
            no group, a warning says so.
        exclude: names of modules to leave whole, with all that is in them; ``*`` stands for
            anything.
        verify: False skips the proof on the first call.

    Returns:
        What was split, what was not and why, and the bytes.

    Raises:
        TopologyError: the mesh does not fit.
        TextEncoderError: the encoder is parallelized already, `exclude` names nothing, or nothing
            can be split.
        RankMismatchError: the ranks do not split the same encoder in the same way.
    """
    if not isinstance(encoder, nn.Module):
        raise TextEncoderError(
            f"encoder must be a torch.nn.Module, not {type(encoder).__name__}. Pass the text "
            "encoder itself, such as pipe.text_encoder."
        )
    encoder = not_compiled(encoder)
    device = device_type_of(encoder)
    topology = resolve(None, mesh, device)
    if any(isinstance(p, DTensor) for p in encoder.parameters()):
        raise TextEncoderError(
            f"{type(encoder).__name__} is parallelized already: it holds DTensors. Call "
            "parallelize_text_encoder once, on an encoder with whole weights."
        )
    found, whole = find(encoder, exclude)
    _check(encoder, found, whole, exclude)
    before = held_bytes(encoder)
    if topology.size == 1:
        whole |= {f.name: "one rank" for f in found}
        return make_report(encoder, 1, {}, whole, before, ())
    facts = {"encoder": type(encoder).__name__, "split": _digest(encoder, found)}
    guards.agree(topology, facts, _TIMEOUT, _STEP)
    record = Record(topology, mesh_of(mesh, device))
    proofs: dict[object, Proof] = {}
    split = {}
    for f in found:
        if verify and f.signature not in proofs:
            proofs[f.signature] = Proof(f, topology.size)
        _split(f, record)
        split[f.name] = f.structure.described(f.structure.shares(topology.size))
    vocabularies, kept = find_vocabularies(encoder, topology.size, exclude, record.pieces.keys())
    for v in vocabularies:
        _split_vocabulary(encoder, v, record)
        split[v.names[0]] = v.described()
        for name in v.names:
            whole.pop(name.rpartition(".")[0], None)
    _records[encoder] = record
    watch(encoder, list(proofs.values()))
    return make_report(encoder, topology.size, split, whole | kept, before, record.pieces.keys())


def _check(
    encoder: nn.Module, found: list[Found], whole: dict[str, str], exclude: Sequence[str]
) -> None:
    name = type(encoder).__name__
    names = [n for n, _ in encoder.named_modules()]
    for e in exclude:
        if not any(is_excluded(n, [e]) for n in names):
            some = [f.name for f in found][:4]
            raise TextEncoderError(
                f"exclude names {e!r}, and {name} has no such module. It has, for example, {some}."
            )
    if not found:
        reasons = "; ".join(f"{n or '(root)'}: {r}" for n, r in list(whole.items())[:8])
        raise TextEncoderError(
            f"found nothing to split in {name}. Modules with Linears, and why they stay whole: "
            f"{reasons or 'there are none'}. Leave this encoder as it is, or pass the part that "
            "holds its layers."
        )


def _split(found: Found, record: Record) -> None:
    """Put this rank's part in place of each parameter, and let PyTorch run it."""
    module, structure = found.module, found.structure
    assert record.mesh is not None
    shares = structure.shares(record.topology.size)
    for name, cut in structure.cuts(module):
        parameter = module.get_parameter(name)
        piece = piece_of(cut, shares, record.topology.rank, parameter.shape)
        record.pieces[f"{found.name}.{name}".lstrip(".")] = piece
        # The module's own parameters meet plain tensors, so they stay plain.
        place = None if name in structure.own else Shard(cut.dim)
        _set(module, name, piece.take(parameter.detach()), record.mesh, place)
    bias = f"{structure.row}.bias"
    if bias in dict(module.named_parameters()):
        _set(module, bias, module.get_parameter(bias).detach(), record.mesh, Replicate())
    columns = {n: ColwiseParallel() for n in (*structure.columns, *structure.tables)}
    # No source rank: every rank has its own part already, so nothing is sent.
    parallelize_module(
        module, record.mesh, {**columns, structure.row: RowwiseParallel()}, src_data_rank=None
    )
    for name, value in structure.local_attributes(shares).items():
        setattr(module, name, value)


def _split_vocabulary(encoder: nn.Module, vocabulary: Vocabulary, record: Record) -> None:
    assert record.mesh is not None
    for name in vocabulary.parameters:
        old = encoder.get_parameter(name)
        piece = piece_of(CUT, {ROWS: vocabulary.share}, record.topology.rank, old.shape)
        record.pieces[name] = piece
        _set(encoder, name, piece.take(old.detach()), record.mesh, Shard(0))
    parallelize(encoder, vocabulary, record.mesh)


def _set(
    module: nn.Module, name: str, local: Tensor, mesh: DeviceMesh, place: Placement | None
) -> None:
    """Put `local` in place of a parameter, as a DTensor if it has a place."""
    old = module.get_parameter(name)
    owner, _, leaf = name.rpartition(".")
    value = DTensor.from_local(local, mesh, [place], run_check=False) if place else local
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module.get_submodule(owner), leaf, new)


def as_parameter(local: Tensor, like: nn.Parameter) -> nn.Parameter:
    """`local` as the parameter that `like` is: a DTensor with the same placements, or plain."""
    value = local
    if isinstance(like, DTensor):
        value = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _digest(encoder: nn.Module, found: list[Found]) -> str:
    shapes = [(n, tuple(p.shape), str(p.dtype)) for n, p in encoder.named_parameters()]
    text = repr((shapes, [(f.name, f.structure) for f in found]))
    return f"{len(found)} modules, {hashlib.sha256(text.encode()).hexdigest()[:16]}"
