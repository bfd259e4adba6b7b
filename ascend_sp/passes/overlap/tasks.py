"""A graph as tasks for the scheduler, and an order of tasks as an order of nodes.

A node that takes no time (a view, a wait, a size) is no task: it goes with the first task that
needs it, so waits, and what only rearranges their results, come last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from torch import fx

from ascend_sp.graph.context import is_random
from ascend_sp.graph.cost.estimate import Estimator, bytes_of, tensors_of
from ascend_sp.graph.families import ATTENDS, MOVES, is_product, name_of
from ascend_sp.graph.origin import MATERIALISE, exchange_of, origin_of
from ascend_sp.passes.overlap.memory import made_of_weights
from ascend_sp.passes.overlap.scheduler import Task
from ascend_sp.runtime.ops import STARTS

Seconds = Callable[[fx.Node], float]
Behind: TypeAlias = "dict[fx.Node, frozenset[int]]"
"""The tasks that a node's value stands on directly."""


@dataclass
class Program:
    """Tasks, and the nodes that they are."""

    nodes: list[fx.Node]
    """All of the graph."""
    tasks: list[Task]
    node_of: list[fx.Node]
    """Of each task."""


def alike_on_all_ranks(node: fx.Node) -> bool:
    """Whether every rank has this node, so that an order may depend on its cost.

    Of what moves shards, and of the moves of an exchange, another rank may have others: padding,
    offsets.
    """
    if node.target in STARTS:
        return True
    origin = origin_of(node)
    if origin is not None and origin.made_by == MATERIALISE:
        return False
    return not (node.target in MOVES and exchange_of(node))


def neutral_seconds(estimator: Estimator) -> Seconds:
    """Costs that every rank comes to: nothing for what other ranks may not have."""
    return lambda node: estimator.seconds(node) if alike_on_all_ranks(node) else 0.0


def program(
    nodes: Iterable[fx.Node],
    seconds: Seconds,
    estimator: Estimator,
    fuses: bool,
    static_inputs: Collection[str] = (),
) -> Program:
    """The tasks of a graph; see `add_tasks`."""
    found = Program(list(nodes), [], [])
    found.node_of = add_tasks(
        found.nodes,
        seconds,
        estimator,
        fuses=fuses,
        tasks=found.tasks,
        static_inputs=static_inputs,
    )
    return found


def add_tasks(
    nodes: Iterable[fx.Node],
    seconds: Seconds,
    estimator: Estimator,
    *,
    fuses: bool,
    tasks: list[Task],
    static_inputs: Collection[str] = (),
    expand: Mapping[Any, Callable[[fx.Node, Behind], frozenset[int]]] | None = None,
) -> list[fx.Node]:
    """Append the tasks of a graph to `tasks`.

    Args:
        nodes: all of the graph, in an order in which it can run.
        seconds: what a node costs the device; 0 makes it part of a task.
        estimator: what a collective costs the link and the device.
        fuses: the target merges ops that are no products, so that only products can be moved.
        tasks: takes them.
        static_inputs: names of the parameters and buffers; what gathers them may begin at any time.
        expand: for targets that are several tasks, what appends them and says which of them stand
            behind the result.

    Returns:
        The node of each task, expanded ones left out.
    """
    node_of: list[fx.Node] = []
    behind: Behind = {}
    drawn: int | None = None
    nodes = list(nodes)
    weights = made_of_weights(nodes, static_inputs)
    for node in nodes:
        if expand and node.target in expand:
            behind[node] = expand[node.target](node, behind)
            continue
        needs = frozenset[int]().union(*(behind[x] for x in node.all_input_nodes))
        starts = node.target in STARTS
        cost, work = estimator.transfer(node) if starts else (seconds(node), 0.0)
        if not starts and (cost <= 0 or node.op in ("placeholder", "output")):
            behind[node] = needs
            continue
        random = is_random(node.target)
        if random:  # numbers are drawn in the order of the program
            needs |= {drawn} if drawn is not None else set()
            drawn = len(tasks)
        behind[node] = frozenset({len(tasks)})
        serves = exchange_of(node) if starts else ""
        # No lowering merges products or attention into their neighbours: they stay where put.
        stays = not fuses or is_product(node) or name_of(node) in ATTENDS
        fills = not starts and not random and stays
        whole = sum(map(bytes_of, tensors_of(node))) if starts and node in weights else 0
        tasks.append(
            Task(node.name, cost, tuple(sorted(needs)), starts, work, serves, fills, whole)
        )
        node_of.append(node)
    return node_of


def nodes_in(order: Iterable[int], program: Program) -> list[fx.Node]:
    """All nodes, tasks in `order`, the others as late as their first use allows."""
    place = {n: i for i, n in enumerate(program.nodes)}
    out = [n for n in program.nodes if n.op == "placeholder"]
    done = set(out)

    def add(node: fx.Node) -> None:
        needed, stack = {node}, [node]
        while stack:
            for x in stack.pop().all_input_nodes:
                if x not in done and x not in needed:
                    needed.add(x)
                    stack.append(x)
        out.extend(sorted(needed, key=place.__getitem__))
        done.update(needed)

    for t in order:
        add(program.node_of[t])
    for node in program.nodes:
        if node not in done:
            add(node)
    return out


def relink(order: Iterable[fx.Node]) -> None:
    """Put the nodes of a graph into `order`."""
    for before, after in pairwise(order):
        if before.next is not after:
            before.append(after)
