"""Trees by a binary Tree-LSTM (Tai, Socher and Manning 2015), whose cells pass on [h, c] in one tensor.

::

    leaf      i, o, u = W_leaf e(word)            c = s(i) tanh(u)                              h = s(o) tanh(c)
    branch    i, f_l, f_r, o, u = W [h_l, h_r]    c = s(i) tanh(u) + s(f_l) c_l + s(f_r) c_r    h = s(o) tanh(c)
    logits    V h,  at every node that has a label                                              s: logistic function

      words --> leaf --> leaves --> state --> root --yes--> out --> loss <-- label
                                      ^        +--no--> pair --> branch --+
                                      +-----------------------------------+           state (instance, tree node)

Tree nodes have heap numbers: the root is 1, the children of n are 2n and 2n + 1. Where every node has a label, `out`
follows `state` and the root's message ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn

from decoupled.data import structured
from decoupled.data.structured import Structured, Tree
from decoupled.graph import PPT, Cond, Flatmap, Group, Instance, Loss, NodeGraph, Phi, Pumped, Ungroup
from decoupled.specs import positive
from decoupled.tasks import register
from decoupled.tasks.base import Grouped, one_each


class Leaf(nn.Module):
    """States (nodes, 2 hidden) of leaves from their word numbers (nodes,)."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, hidden)
        self.gates = nn.Linear(hidden, 3 * hidden)

    def forward(self, words: Tensor) -> Tensor:
        i, o, u = self.gates(self.embed(words)).chunk(3, 1)
        c = torch.sigmoid(i) * torch.tanh(u)
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], 1)


class Branch(nn.Module):
    """States (nodes, 2 hidden) of parents from the states of both children side by side (nodes, 4 hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * hidden, 5 * hidden)
        with torch.no_grad():  # forget gates open at first, as usual for an LSTM
            self.gates.bias[hidden : 3 * hidden] += 1

    def forward(self, children: Tensor) -> Tensor:
        h_l, c_l, h_r, c_r = children.chunk(4, 1)
        i, f_l, f_r, o, u = self.gates(torch.cat([h_l, h_r], 1)).chunk(5, 1)
        c = torch.sigmoid(i) * torch.tanh(u) + torch.sigmoid(f_l) * c_l + torch.sigmoid(f_r) * c_r
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], 1)


class Readout(nn.Module):
    """Logits (nodes, classes) from states (nodes, 2 hidden)."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, classes)

    def forward(self, state: Tensor) -> Tensor:
        return self.linear(state[:, : self.linear.in_features])


class TreeLSTM(nn.Module):
    """A binary Tree-LSTM; forward batches all nodes of one height, over all trees.

    Args:
        words: number of different leaves. classes: of a node. hidden: width of h, of c and of the embedding.
    """

    def __init__(self, words: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.leaf = Leaf(words, hidden)
        self.branch = Branch(hidden)
        self.out = Readout(hidden, classes)

    def forward(self, trees: Several[Tree]) -> tuple[Tensor, Tensor]:
        """Return logits (labelled nodes, classes) and labels, tree by tree in post-order."""
        nodes, offset = [], 0  # (height, place in the batch, word, places of both children)
        for tree in trees:
            for node, (height, (left, right)) in enumerate(zip(tree.heights(), tree.children, strict=True)):
                nodes.append((height, offset + node, tree.words[node], offset + left, offset + right))
            offset += len(tree)
        height, place, word, left, right = torch.tensor(sorted(nodes)).unbind(1)
        row = torch.empty(offset, dtype=torch.long).scatter_(0, place, torch.arange(offset))  # place -> row of states
        leaves, *sizes = torch.bincount(height).tolist()
        states = self.leaf(word[:leaves])
        for left_of, right_of in zip(left[leaves:].split(sizes), right[leaves:].split(sizes), strict=True):
            states = torch.cat([states, self.branch(torch.cat([states[row[left_of]], states[row[right_of]]], 1))])
        labels = torch.tensor([label for tree in trees for label in tree.labels])
        return self.out(states[row[labels >= 0]]), labels[labels >= 0]

    def one_by_one(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Return the same for one tree, one node after the other: nothing is batched."""
        states: list[Tensor] = []
        for word, (left, right) in zip(tree.words, tree.children, strict=True):
            if left < 0:
                states.append(self.leaf(torch.tensor([word])))
            else:
                states.append(self.branch(torch.cat([states[left], states[right]], 1)))
        labelled = [node for node, label in enumerate(tree.labels) if label >= 0]
        logits = torch.cat([self.out(states[node]) for node in labelled])
        return logits, torch.tensor([tree.labels[node] for node in labelled])


class Trees(Grouped[Tree]):
    """What `ListOps` and `Treebank` share; every instance is one tree."""

    def __init__(self, data: Structured[Tree], hidden: int, everywhere: bool) -> None:
        super().__init__()
        self.name, self.data, self.hidden, self.description = data.name, data, hidden, data.description
        self.everywhere = everywhere  # every node has a label, not only the root

    def network(self) -> TreeLSTM:
        return TreeLSTM(len(self.data.tokens), self.data.classes, self.hidden)

    def graph(self) -> NodeGraph:
        graph, parts = NodeGraph(self.name), self.network()
        words, label = graph.input("words"), graph.input("label")
        leaves = Ungroup(lambda i: [(i, n) for n in i.about], name="leaves")(PPT(parts.leaf, "leaf")(words))
        state = Phi("state")
        here = state(leaves)
        if self.everywhere:
            labelled, child = here, Flatmap(lambda i, n: [(i, n)] if n > 1 else [], "above")(here)
        else:
            labelled, child = Cond(lambda i, n: n == 1, name="root")(here)
        pair = Group(lambda i, n: (i, n // 2), 2, dim=1, name="pair")(child)  # left before right
        state.join(PPT(parts.branch, "branch")(pair))
        loss, score = self.objective
        Loss(loss, score=score)(PPT(parts.out, "out")(labelled), label)
        return graph

    def groups(self, split: str) -> list[list[Tree]]:
        return one_each(getattr(self.data, split))

    def instance(self, group: Several[Tree]) -> Instance:
        (tree,) = group
        heap = heap_numbers(tree)
        leaves = [node for node, word in enumerate(tree.words) if word >= 0]
        messages = [Pumped("words", (), torch.tensor([tree.words[node] for node in leaves]))]
        labelled = [(heap[node], label) for node, label in enumerate(tree.labels) if label >= 0]
        messages += [Pumped("label", (n,), torch.tensor([label])) for n, label in labelled]
        return Instance(messages, about=tuple(heap[node] for node in leaves), losses=len(labelled))


def heap_numbers(tree: Tree) -> list[int]:
    """Number the nodes: the root 1, the children of n 2n (left) and 2n + 1."""
    numbers = [1] * len(tree)
    for node, (parent, side) in reversed(list(enumerate(tree.parents()))):
        if parent >= 0:
            numbers[node] = 2 * numbers[parent] + side
    return numbers


@register("listops")
class ListOps(Trees):
    """The value of a nested expression over digits, by a Tree-LSTM along its binary tree.

    Args:
        hidden: width of a state.
        data: options of the data set `listops`.
    """

    def __init__(self, *, hidden: int = 128, data: Mapping[str, Any] | None = None) -> None:
        positive("task 'listops'", hidden=hidden)
        super().__init__(structured.load("listops", **(data or {})), hidden, everywhere=False)


@register("treebank")
class Treebank(Trees):
    """Five classes of sentiment at every node of a sentence's tree; accuracy is over all nodes.

    Args:
        hidden: width of a state.
        data: options of the data set `treebank`; its `path` must be given.
    """

    def __init__(self, *, hidden: int = 128, data: Mapping[str, Any] | None = None) -> None:
        positive("task 'treebank'", hidden=hidden)
        super().__init__(structured.load("treebank", **(data or {})), hidden, everywhere=True)
