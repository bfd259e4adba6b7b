"""Vocabularies: embeddings and output projections with a row for each token, split by rows.

Nothing need be proved here. A rank looks up the tokens that it has and zeros for the others, and
the sum is the embedding; a rank's part of a projection is gathered (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ascend_sp.text_encoder.find import is_excluded
from ascend_sp.text_encoder.split import Cut, Share, share_evenly

ROWS = "rows"
CUT = Cut(0, (ROWS,), 1)
# Rows for each column from which a table is a vocabulary, and worth a collective.
_RATIO = 6


@dataclass(frozen=True)
class Vocabulary:
    """Modules that share one table."""

    names: tuple[str, ...]
    """All of them; several if they are tied."""
    share: Share
    parameters: tuple[str, ...]
    """What is split, by full name."""

    def described(self) -> str:
        """How it is split, in words."""
        return f"vocabulary, {self.share.total} rows: {self.share.local} a rank"


def find_vocabularies(
    encoder: nn.Module, ranks: int, exclude: Sequence[str], taken: Collection[str]
) -> tuple[list[Vocabulary], dict[str, str]]:
    """Tables that can be split, and the reason for each embedding that cannot.

    Args:
        encoder: any module.
        ranks: P.
        exclude: names or patterns of modules to leave alone.
        taken: full names of parameters that are split already.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: list[Vocabulary] = []
    whole: dict[str, str] = {}
    for full in owners.values():
        names = [n.rpartition(".")[0] for n in full]
        modules = [encoder.get_submodule(n) for n in names]
        embeds = any(isinstance(m, nn.Embedding) for m in modules)
        projects = type(modules[0]) is nn.Linear and full[0].endswith(".weight")
        if not set(full).isdisjoint(taken) or not (embeds or projects):
            continue
        reason = "excluded" if any(is_excluded(n, exclude) for n in names) else ""
        reason = reason or _reason(modules, ranks)
        if reason:
            whole |= {names[0]: reason} if embeds else {}
            continue
        weight = encoder.get_parameter(full[0])
        biases = [f"{n}.bias" for n, m in zip(names, modules, strict=True) if _biased(m)]
        share = share_evenly(weight.shape[0], ranks)
        found.append(Vocabulary(tuple(names), share, (*full, *biases)))
    return found, whole


def _biased(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _reason(modules: list[nn.Module], ranks: int) -> str:
    """Why a table stays whole; empty if it need not."""
    rows, columns = modules[0].get_parameter("weight").shape
    if rows < _RATIO * columns:
        return f"an embedding with few rows: {rows} of {columns}"
    for m in modules:
        if type(m) is nn.Linear:
            if rows % ranks:
                return f"its {rows} rows are also a projection's, and {ranks} does not divide them"
        elif type(m) is not nn.Embedding or m.max_norm is not None or m.sparse:
            return f"a {type(m).__name__}, not a plain nn.Embedding"
    return ""


def parallelize(encoder: nn.Module, vocabulary: Vocabulary, mesh: DeviceMesh) -> None:
    """Have PyTorch run the modules, whose tables hold this rank's rows already."""
    first = encoder.get_submodule(vocabulary.names[0])
    for name in vocabulary.names:
        module = encoder.get_submodule(name)
        style = (
            RowwiseParallel(input_layouts=Replicate())
            if isinstance(module, nn.Embedding)
            else ColwiseParallel(output_layouts=Replicate())
        )
        parallelize_module(module, mesh, style, src_data_rank=None)
        module.weight = first.get_parameter("weight")  # tied again: PyTorch made one for each
