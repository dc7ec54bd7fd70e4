"""Printing and drawing: every node and every connection is there, once."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from decoupled.graph.draw import columns, dot, svg
from decoupled.graph.testing import rnn, spread

NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_a_drawing_has_every_node_and_connection_and_tells_loops_apart() -> None:
    graph = rnn(5, 4, 3).check()
    root = ElementTree.fromstring(svg(graph, {"recurrent": 1, "embed": 0}))
    texts = [text.text or "" for text in root.iter(f"{NAMESPACE}text")]
    assert sorted(text.split(" ")[0] for text in texts) == sorted(graph.nodes)
    paths = [path for path in root.iter(f"{NAMESPACE}path") if path.get("marker-end")]
    assert len(paths) == len(list(graph.edges()))
    assert sum(path.get("stroke-dasharray") is not None for path in paths) == 1  # the way back of the loop
    assert len({rect.get("fill") for rect in root.iter(f"{NAMESPACE}rect")}) == 3


def test_columns_follow_the_messages() -> None:
    depth = columns(rnn(5, 4, 3).check())
    assert depth["token"] == depth["start"] == 0
    assert depth["embed"] < depth["concat"] < depth["recurrent"] < depth["more"] < depth["out"] < depth["loss"]


def test_graphviz_and_print_have_the_same_connections() -> None:
    graph = spread(3, 2).check()
    lines = re.findall(r"^  (\w+) -> (\w+)", dot(graph, {"along": 1}), re.MULTILINE)
    assert sorted(lines) == sorted((a, b) for a, _, b, _ in graph.edges())
    text = str(graph)
    assert all(re.search(rf"^  {name} +{node.kind}\b", text, re.MULTILINE) for name, node in graph.nodes.items())
    assert "0: rows[1]; 1: out[0]" in text
