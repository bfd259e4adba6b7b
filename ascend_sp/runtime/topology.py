"""Which ranks share one sequence: resolved once a compile."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ascend_sp.runtime.errors import TopologyError
from ascend_sp.runtime.npu import DEVICE
from ascend_sp.runtime.unsplit import Unsplit

MESH_DIM = "sp"
_meshes: dict[tuple[str, int, int], DeviceMesh] = {}
_npu_groups: dict[tuple[str, str], dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Topology:
    """One rank's view of its sequence-parallel group."""

    rank: int = 0
    """Rank in the group, 0 <= rank < size."""
    size: int = 1
    """Number of ranks P in the group."""
    group_name: str = ""
    """Name by which functional collectives find the group; empty when P = 1."""
    ranks: tuple[int, ...] = (0,)
    """Global ranks, in group order."""


SINGLE = Topology()


def resolve(
    degree: int | None,
    mesh: DeviceMesh | None,
    device_type: str,
    enabled: bool = True,
    strict: bool = False,
) -> Topology:
    """The topology for one compile; warns if a launcher started several processes, and no group.

    Args:
        degree: ranks that share a sequence; None takes all ranks. Must divide the world size.
        mesh: a 1-D DeviceMesh, or one with a dim named ``"sp"``; excludes `degree`.
        device_type: where the collectives run: ``"cpu"``, ``"cuda"`` or ``"npu"``.
        enabled: False gives P = 1 whatever the rest says.
        strict: raise that warning.

    Raises:
        TopologyError: the mesh or the degree does not fit; the message says what would.
        UnshardedError: `strict`, and the processes have no group.
    """
    if not enabled:
        return SINGLE
    if mesh is not None:
        return _of_mesh(sequence_dim(mesh), degree, device_type)
    if not (dist.is_available() and dist.is_initialized()):
        if degree is not None and degree > 1:
            raise TopologyError(
                f"degree={degree} needs a process group, and there is none. Launch with torchrun "
                "and call torch.distributed.init_process_group before the first call, or leave "
                "degree unset to compile for one rank."
            )
        if degree is None:
            _no_group(strict)
        return SINGLE
    world = dist.get_world_size()
    degree = world if degree is None else degree
    if world % degree:
        raise TopologyError(
            f"degree={degree} does not divide the world size {world}. Choose one of "
            f"{[d for d in range(1, world + 1) if world % d == 0]}."
        )
    if degree == 1:
        return SINGLE
    if degree == world:
        return _of_group(_world(), device_type)
    # Groups are made once for each split of this world: making one is itself a collective.
    key = (_world().group_name, world, degree)
    if key not in _meshes:
        _meshes[key] = init_device_mesh(
            device_type, (world // degree, degree), mesh_dim_names=("dp", MESH_DIM)
        )
    return _of_mesh(_meshes[key][MESH_DIM], None, device_type)


def sequence_dim(mesh: DeviceMesh) -> DeviceMesh:
    """The one dim of `mesh` whose ranks work together.

    Raises:
        TopologyError: it is not a mesh, or it is not clear which dim.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TopologyError(
            f"mesh must be a torch DeviceMesh, not {type(mesh).__name__}. For a ProcessGroup, "
            "pass DeviceMesh.from_group(group, device_type)."
        )
    if mesh.ndim == 1:
        return mesh
    names = mesh.mesh_dim_names or ()
    if MESH_DIM not in names:
        raise TopologyError(
            f"the mesh has {mesh.ndim} dims named {list(names)}, none of them {MESH_DIM!r}. Pass a "
            f"1-D mesh, mesh[<name>], or name the sequence-parallel dim {MESH_DIM!r}."
        )
    return mesh[MESH_DIM]


def mesh_of(mesh: DeviceMesh | None, device_type: str) -> DeviceMesh:
    """The 1-D mesh of ranks that share weights: `mesh`, see `sequence_dim`, or all ranks."""
    if mesh is not None:
        return sequence_dim(mesh)
    return init_device_mesh(device_type, (dist.get_world_size(),))


def _of_mesh(mesh: DeviceMesh, degree: int | None, device_type: str) -> Topology:
    if degree is not None and degree != mesh.size():
        raise TopologyError(
            f"degree={degree} and a mesh of {mesh.size()} ranks contradict each other. "
            "Give one of them."
        )
    if mesh.get_coordinate() is None:
        raise TopologyError(
            f"rank {dist.get_rank()} is not in the mesh {mesh}. Pass each rank the mesh it is in, "
            "or compile with sequence_parallel=False on ranks outside it."
        )
    return SINGLE if mesh.size() == 1 else _of_group(mesh.get_group(), device_type)


def _of_group(group: dist.ProcessGroup, device_type: str) -> Topology:
    if device_type == DEVICE:
        group = _npu_group(group)
    return Topology(
        rank=dist.get_rank(group),
        size=dist.get_world_size(group),
        group_name=group.group_name,
        ranks=tuple(dist.get_process_group_ranks(group)),
    )


def _no_group(strict: bool) -> None:
    """Tell of a launcher's processes that are not joined, so that each works alone."""
    launched = os.environ.get("WORLD_SIZE", "")
    if not launched.isdecimal() or int(launched) <= 1:
        return
    Unsplit(
        ["no process group"],
        f"nothing is split: WORLD_SIZE={launched} says that this is one of {launched} processes, "
        "but there is no process group, so each works alone on all of it. Call "
        "torch.distributed.init_process_group before the first call of the model (and before "
        "parallelize_text_encoder); what is compiled already stays as it is until "
        "torch.compiler.reset().",
        "If each process is to work alone, compile with degree=1 (ASCEND_SP_DEGREE=1), and nothing "
        "is said of it.",
    ).tell(error=strict)


def _npu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group`, or one of the same ranks that has a backend for NPUs and no other.

    torchair asks a group for its one device to learn the name of HCCL's communicator, and takes the
    CPU's if there are two.
    """
    config = dist.get_backend_config(group)
    backends = dict(entry.split(":") for entry in config.split(","))
    if DEVICE not in backends:
        raise TopologyError(
            f"the model is on NPUs, and the process group has no backend for them, only {config}. "
            'Call torch.distributed.init_process_group("hccl") before the first call, after '
            '"import torch_npu".'
        )
    if len(backends) == 1:
        return group
    key = (_world().group_name, group.group_name)
    if key not in _npu_groups:
        # All ranks of the group compile, so all of them come here; others need not.
        _npu_groups[key] = dist.new_group(
            dist.get_process_group_ranks(group),
            backend=backends[DEVICE],
            use_local_synchronization=True,
        )
    return _npu_groups[key]


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def device_type_of(module: nn.Module) -> str:
    """Where the weights are; for those on ``meta``, where the process group works."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device.type
    if not (dist.is_available() and dist.is_initialized()):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [pair.split(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return accelerator.type if accelerator and accelerator.type in devices else "cpu"
