"""Static graphs that run instance-dependent control flow (loops, trees, graphs) by passing keyed messages.

node.py        the protocol          transform.py, routing.py, gathering.py   the nodes
build.py       building and checks   instance.py                              instances and tasks
"""

from decoupled.graph.asynchrony import Asynchrony
from decoupled.graph.build import NodeGraph, Wire
from decoupled.graph.execute import execute
from decoupled.graph.gathering import Flatmap, Group, Ungroup
from decoupled.graph.instance import Instance, Pumped, Task
from decoupled.graph.node import Key, Node
from decoupled.graph.routing import Broadcast, Concat, Cond, Isu, Phi, Split
from decoupled.graph.trainer import GraphTrainer
from decoupled.graph.transform import NPT, PPT, Loss

__all__ = [
    "NPT", "PPT", "Asynchrony", "Broadcast", "Concat", "Cond", "Flatmap", "GraphTrainer", "Group", "Instance", "Isu",
    "Key", "Loss", "Node", "NodeGraph", "Phi", "Pumped", "Split", "Task", "Ungroup", "Wire", "execute",
]  # fmt: skip
