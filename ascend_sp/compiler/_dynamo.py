"""The private Dynamo that tells of code before it is compiled, or given up.

`tests/test_pytorch_pins.py` fails when PyTorch moves any of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import config, convert_frame
from torch._dynamo.cache_size import exceeds_recompile_limit
from torch._dynamo.utils import (
    get_hook_for_recompile_user_context,
    register_hook_for_recompile_user_context,
)
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from ascend_sp.compiler._pytorch import recompilation

__all__ = ["Frame", "before_each_compile", "errors_are_suppressed"]


@dataclass(frozen=True)
class Frame:
    """A piece of code that is called with what none of its programs is for."""

    number: int
    """Dynamo's, of the code; it begins anew with `torch.compiler.reset`."""
    times: int
    """How often it was compiled before."""
    name: str
    """Name and place of the function."""
    sizes: Mapping[str, str]
    """Those of the tensors of this call, and numbers in it, by the name of the argument."""
    reason: str
    """The guard that failed, in Dynamo's words; empty at the first compile."""
    limit: str
    """Which limit on recompiles it has reached, so that it is not compiled; empty if none."""
    fails: bool
    """Whether Dynamo raises an error where a limit is reached."""


class _Hook:
    """A caller of one function; Dynamo's interface is for a line in its records, which we leave."""

    def __init__(self, look: Callable[[Frame], None]) -> None:
        self.look = look

    def __call__(self) -> str:
        frame = _at_hand()
        if frame is not None:
            self.look(frame)
        return ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hook) and other.look is self.look

    def __hash__(self) -> int:
        return hash(self.look)


def before_each_compile(look: Callable[[Frame], None]) -> None:
    """Have `look` called whenever Dynamo is about to compile code, or to give it up; once.

    What it raises is raised by the call of the compiled model.
    """
    hook = _Hook(look)
    if hook not in (get_hook_for_recompile_user_context() or ()):
        register_hook_for_recompile_user_context(hook)


def _at_hand() -> Frame | None:
    """The code that is about to be compiled, from the frame of Dynamo's that has its facts."""
    at: Any = sys._getframe()
    while at is not None:
        code = at.f_code
        if code.co_name == "_compile" and code.co_filename == convert_frame.__file__:
            known = at.f_locals
            exceeded, limit = exceeds_recompile_limit(known["cache_size"], known["compile_id"])
            function = known["code"]
            called = known["frame"]
            compile_id = known["compile_id"]
            return Frame(
                compile_id.frame_id,
                compile_id.frame_compile_id,
                f"{function.co_name} ({function.co_filename}:{function.co_firstlineno})",
                _sizes(called.f_locals) if called is not None else {},
                recompilation()[1],
                f"torch._dynamo.config.{limit} = {getattr(config, limit)}" if exceeded else "",
                bool(known["one_graph"] or config.fail_on_recompile_limit_hit),
            )
        at = at.f_back
    return None


def _sizes(arguments: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for name, value in arguments.items():
        for path, leaf in _leaves(value):
            if isinstance(leaf, torch.Tensor):
                out[name + path] = str(list(leaf.shape))
            elif isinstance(leaf, int) and not isinstance(leaf, bool):
                out[name + path] = str(leaf)
    return out


def _leaves(value: Any) -> list[tuple[str, Any]]:
    """What `value` holds, and where in it."""
    try:
        return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(value)[0]]
    except ValueError:  # a class that names none of its parts, as the outputs of diffusers do
        return [(f"[{i}]", leaf) for i, leaf in enumerate(tree_leaves(value))]


def errors_are_suppressed() -> bool:
    """Whether Dynamo runs code uncompiled where its compile fails, and only logs the error."""
    return bool(config.suppress_errors)
