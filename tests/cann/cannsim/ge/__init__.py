"""The graph engine: graphs that torchair builds, executed on CPU as GE would compute them."""

from __future__ import annotations

from cannsim.ge.graph import Graph, Op
from cannsim.ge.session import forget, graphs, install

__all__ = ["Graph", "Op", "forget", "graphs", "install"]
