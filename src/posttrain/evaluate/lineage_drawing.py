"""A lineage as a drawing: layers from the first data on the left to the model on the right.

Runs are not boxes of their own: one run may make several models, each from the one before, and as a box it would stand
both before and after itself. The artifact's box names the run that made it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping

from posttrain.core import Record
from posttrain.registry import Lineage, LineageNode

BOX_WIDTH, BOX_HEIGHT = 172.0, 62.0
GAP_X, GAP_Y = 38.0, 18.0
LANE_HEIGHT = 6.0  # room for an arrow that passes through a layer
MARGIN = 4.0
MAX_NAME = 19  # characters that fit in a box

Place = tuple[float, float]


class Box(Record, frozen=True, kw_only=True):
    """An artifact as drawn."""

    x: float
    y: float
    kind: str
    name: str  # shortened to fit
    id: str  # twelve digits
    made_by: str  # the run, shortened; "" where none is known
    hover: str
    is_root: bool


class LineageDrawing(Record, frozen=True, kw_only=True):
    """Boxes and the arrows between them."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[str, ...]  # SVG paths
    box_width: float = BOX_WIDTH
    box_height: float = BOX_HEIGHT


def draw_lineage(lineage: Lineage) -> LineageDrawing:
    """Lay a lineage out in layers (Sugiyama); an arrow over several layers has a lane of its own in each between."""
    nodes = {node.id: node for node in lineage.nodes if node.kind != "run"}
    runs = {edge.child: lineage.node(edge.parent) for edge in lineage.edges if edge.relation == "made by"}
    links = [(edge.parent, edge.child) for edge in lineage.edges if edge.parent in nodes and edge.child in nodes]
    depth = _depths(list(nodes), links)
    chains = [_chain(parent, child, depth) for parent, child in links]
    layers = _ordered(list(nodes), chains, depth)
    height = max(_layer_height(layer, nodes) for layer in layers) + 2 * MARGIN
    places: dict[str, Place] = {}  # left edge, middle
    for column, layer in enumerate(layers):
        y = (height - _layer_height(layer, nodes)) / 2
        for item in layer:
            tall = BOX_HEIGHT if item in nodes else LANE_HEIGHT
            places[item] = (MARGIN + column * (BOX_WIDTH + GAP_X), y + tall / 2)
            y += tall + GAP_Y
    return LineageDrawing(
        width=len(layers) * (BOX_WIDTH + GAP_X) - GAP_X + 2 * MARGIN,
        height=height,
        boxes=tuple(_box(nodes[i], runs.get(i), places[i], i == lineage.root().id) for i in nodes),
        arrows=tuple(_arrow([places[item] for item in chain]) for chain in chains),
    )


def _depths(nodes: list[str], links: list[tuple[str, str]]) -> dict[str, int]:
    """How many steps each node is at most before the last one. A circle of links is cut."""
    children: dict[str, list[str]] = defaultdict(list)
    for parent, child in links:
        children[parent].append(child)
    depth: dict[str, int] = {}

    def measure(node: str, path: frozenset[str]) -> int:
        if node not in depth:
            below = [measure(child, path | {node}) for child in children[node] if child not in path | {node}]
            depth[node] = 1 + max(below, default=-1)
        return depth[node]

    for node in nodes:
        measure(node, frozenset())
    return depth


def _chain(parent: str, child: str, depth: dict[str, int]) -> list[str]:
    """A link as the items it passes: a lane in every layer between its ends."""
    between = range(depth[parent] - 1, depth[child], -1)
    return [parent, *(f"{parent}>{child}@{layer}" for layer in between), child]


def _ordered(nodes: list[str], chains: list[list[str]], depth: dict[str, int]) -> list[list[str]]:
    """Layers from first to last; within one, items stand in the order of what they lead to."""
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in nodes:
        layers[depth[node]].append(node)
    children: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        for item, following in itertools.pairwise(chain):
            children[item].append(following)
        for place, item in enumerate(chain[1:-1], 1):
            layers[depth[chain[0]] - place].append(item)
    row: dict[str, float] = {}
    for layer in layers:
        wanted = {item: [row[child] for child in children[item] if child in row] for item in layer}
        layer.sort(key=lambda item: sum(wanted[item]) / len(wanted[item]) if wanted[item] else 0.0)
        row.update({item: index - (len(layer) - 1) / 2 for index, item in enumerate(layer)})
    return layers[::-1]


def _layer_height(layer: list[str], nodes: Mapping[str, LineageNode]) -> float:
    return sum((BOX_HEIGHT if item in nodes else LANE_HEIGHT) + GAP_Y for item in layer) - GAP_Y


def _box(node: LineageNode, run: LineageNode | None, place: Place, is_root: bool) -> Box:
    hover = [f"{node.kind} {node.name}", f"id {node.id}"]
    if run is not None:
        hover.append(run.line())
    contamination = node.meta.get("contamination")
    if isinstance(contamination, dict):
        hover += [f"touches {float(share):.1%} of suite {suite}" for suite, share in contamination.items()]
    return Box(
        x=place[0],
        y=place[1] - BOX_HEIGHT / 2,
        kind=node.kind,
        name=_shortened(node.name),
        id=node.id[:12],
        made_by="" if run is None else run.name,
        hover="\n".join(hover),
        is_root=is_root,
    )


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME // 2 - 1]}…{name[-MAX_NAME // 2 :]}"


def _arrow(places: list[Place]) -> str:
    """From the right edge of the first item through the lanes to the left edge of the last."""
    x, y = places[0][0] + BOX_WIDTH, places[0][1]
    path = [f"M{x:.1f} {y:.1f}"]
    for place in places[1:]:
        x2, y2 = place
        end = x2 - 3 if place is places[-1] else x2
        middle = (x + end) / 2 if end > x else x + GAP_X
        path.append(f"C{middle:.1f} {y:.1f} {middle:.1f} {y2:.1f} {end:.1f} {y2:.1f}")
        x, y = x2 + BOX_WIDTH, y2
        if place is not places[-1]:
            path.append(f"L{x:.1f} {y:.1f}")
    return "".join(path)
