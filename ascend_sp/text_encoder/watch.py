"""When a proof runs: on the first call of its module, away from Dynamo, and never again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ascend_sp.runtime._pytorch import tree_leaves
from ascend_sp.runtime.errors import TextEncoderError
from ascend_sp.text_encoder.proof import Headed, Proof

Forward = Callable[..., Any]
_REASON = "parallelize_text_encoder proves its split when a module is first called"


def watch(encoder: nn.Module, proofs: list[Proof]) -> None:
    """Check each proof when its module is first called.

    Dynamo sees nothing of the encoder's first call. It guards on a `forward` of a module's own, so
    replacing the encoder's makes it compile anew: its graphs never keep a call to a proof.
    """
    if proofs:
        _Watch(encoder, proofs)


class _Watch:
    def __init__(self, encoder: nn.Module, proofs: list[Proof]) -> None:
        self.encoder, self.pending = encoder, set(proofs)
        self.headed: Headed = {}
        self.entered: set[Proof] = set()
        self.first_is_over = False
        self.plain, self.restore = encoder.forward, _restorer(encoder)
        for proof in proofs:
            self._on_first_call(proof)
        self.proving = encoder.forward  # the encoder may be the module of a proof itself
        _wrap(encoder, self._first_call)

    def _on_first_call(self, proof: Proof) -> None:
        restore = _restorer(proof.live)

        def wrap(forward: Forward) -> Forward:
            def first(*args: Any, **kwargs: Any) -> Any:
                self.entered.add(proof)
                split = proof.check(args, kwargs, self.headed)
                out = forward(*args, **kwargs)
                if split is not None:
                    leaves = tree_leaves(out)
                    for i, (dim, share) in split.items():
                        self.headed[id(leaves[i])] = (ref(leaves[i]), dim, share)
                    self.pending.discard(proof)
                    if proof.live is not self.encoder:
                        restore()
                    self._renew()
                return out

            return first

        _wrap(proof.live, wrap)

    def _first_call(self, forward: Forward) -> Forward:
        def first(*args: Any, **kwargs: Any) -> Any:
            hooks = [self._row(p).register_forward_hook(self._refuse(p)) for p in self.pending]
            try:
                out = forward(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
            self.first_is_over = True
            self._renew()
            return out

        return first

    def _renew(self) -> None:
        """Have Dynamo compile the encoder anew, without the proofs that are done."""
        if not self.first_is_over:
            return
        if not self.pending:
            self.restore()
            return
        own = any(p.live is self.encoder for p in self.pending)
        plain = self.proving if own else self.plain
        self.encoder.forward = functools.wraps(plain)(lambda *a, **k: plain(*a, **k))

    def _row(self, proof: Proof) -> nn.Module:
        return proof.live.get_submodule(proof.structure.row)

    def _refuse(self, proof: Proof) -> Callable[[nn.Module, Any, Tensor], None]:
        def refuse(module: nn.Module, args: Any, out: Tensor) -> None:
            if proof not in self.entered:
                raise TextEncoderError(
                    f"{proof.name} ({type(proof.live).__name__}) is not called itself, only its "
                    "Linears are, so its split cannot be proved. Load the encoder again and call "
                    f"parallelize_text_encoder(..., exclude=[{proof.name!r}])."
                )

        return refuse


def _wrap(module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    """Put a wrapper that Dynamo does not compile around `module.forward`."""
    before = module.forward
    module.forward = torch.compiler.disable(functools.wraps(before)(wrap(before)), reason=_REASON)


def _restorer(module: nn.Module) -> Callable[[], None]:
    """Gives `module` the `forward` back that it has now."""
    own = vars(module).get("forward")

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    return restore
