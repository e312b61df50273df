"""What configurations share: every state that they need, once.

A hidden state depends only on the ordered sequence of what has been done to it. A layer that is skipped does nothing;
what the units of another are depends on how its halves read the residual stream:

    sequential   the MLP reads what attention has added to: two units, of which an action may leave either out
    parallel     both read the same state (Cohere, GPT-NeoX): one unit, or the one half that an action leaves
    whole        the layer runs its own forward: one unit, and no half of it can be left out

The sequences of units of all configurations make a trie; each of its nodes is one state that is computed once, and a
sweep that takes the units as they are can do with no fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cogsym.errors import CogsymError
from cogsym.sweeps.layers.actions import ACTIONS, Weights
from cogsym.sweeps.layers.configurations import Configuration

Part = Literal["attention", "mlp", "layer"]
Topology = Literal["sequential", "parallel", "whole"]

_ORDER: dict[Part, int] = {"attention": 0, "mlp": 1, "layer": 0}


class Unit(NamedTuple):
    """What is done to a state at once.

    Attributes:
        layer: index of the decoder layer.
        part: which half of it; "layer" is both at once, as one that runs its own forward or whose halves are parallel.
        weights: the model's, or those of the base checkpoint.
    """

    layer: int
    part: Part
    weights: Weights

    @property
    def attends(self) -> bool:
        """It reads all positions of a state, and has keys and values."""
        return self.part != "mlp"

    @property
    def forwards(self) -> float:
        """Layer-forwards that it costs for each state, a half counting half."""
        return 1.0 if self.part == "layer" else 0.5


@dataclass(eq=False)
class Node:
    """A state: the outcome of a sequence of units.

    Attributes:
        unit: the last one; None for the root, the embeddings.
        parent: index of the node before it; the root's is -1.
        children: indices, one for each different unit that follows.
        ends: indices of the configurations whose last state this is.
        narrow: no attention follows, so that only scored positions matter.
    """

    unit: Unit | None
    parent: int
    children: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    narrow: bool = True


@dataclass(frozen=True)
class Counts:
    """What a sweep costs for each batch of documents.

    Attributes:
        configurations: how many.
        attention_forwards: halves of layers computed, of the attention.
        mlp_forwards: halves of layers computed, of the MLP.
        whole_forwards: layers computed as one unit.
        head_forwards: different states that the head sees.
        kept_layers: forwards of a loop over the configurations with only their kept layers, a half counting half.
        all_layers: forwards of a loop that computes every layer and discards.
    """

    configurations: int
    attention_forwards: int
    mlp_forwards: int
    whole_forwards: int
    head_forwards: int
    kept_layers: float
    all_layers: int

    @property
    def layer_forwards(self) -> float:
        """A half counts half."""
        return (self.attention_forwards + self.mlp_forwards) / 2 + self.whole_forwards


def units(configuration: Configuration, topology: Topology = "sequential") -> list[Unit]:
    """What a configuration does to a state, in order.

    Args:
        configuration: its actions.
        topology: how the halves of the model's layers read the residual stream.

    Raises:
        CogsymError: an action that such layers cannot take.
    """
    return [
        unit for layer, action in enumerate(configuration.actions) for unit in _units_of_layer(layer, action, topology)
    ]


def _units_of_layer(layer: int, name: str, topology: Topology) -> list[Unit]:
    action = ACTIONS[name]
    halves: tuple[tuple[Part, Weights | None], ...] = (("attention", action.attention), ("mlp", action.mlp))
    applied = [Unit(layer, part, weights) for part, weights in halves if weights]
    if topology == "sequential" or not applied:
        return applied
    if action.whole:
        return [Unit(layer, "layer", applied[0].weights)]
    if topology == "whole":
        raise CogsymError(
            f"The action {name} treats the halves of layer {layer} differently, and the model's layers can only run "
            "whole; choose an action for whole layers, such as skip."
        )
    if len(applied) > 1:
        raise CogsymError(
            f"The action {name} takes the halves of layer {layer} from two checkpoints, and in this model both are "
            "computed from one norm; choose an action for one half, or for whole layers."
        )
    return applied


class Trie:
    """The states that configurations need, each once.

    Attributes:
        configurations: as given; they are distinct.
        topology: of the layers.
        nodes: parents before their children; the root is the first.
        last: for each configuration the node it ends with.
    """

    def __init__(self, configurations: Iterable[Configuration], topology: Topology = "sequential") -> None:
        """Build it.

        Args:
            configurations: distinct ones, of one number of layers.
            topology: how the halves of the model's layers read the residual stream.

        Raises:
            CogsymError: an action that such layers cannot take.
        """
        self.configurations, self.topology = tuple(configurations), topology
        self.nodes = [Node(None, -1)]
        self.last: list[int] = []
        children: dict[tuple[int, Unit], int] = {}
        for c, configuration in enumerate(self.configurations):
            at = 0
            for unit in units(configuration, topology):
                child = children.get((at, unit))
                if child is None:
                    child = children[at, unit] = len(self.nodes)
                    self.nodes[at].children.append(child)
                    self.nodes.append(Node(unit, at))
                at = child
            self.nodes[at].ends.append(c)
            self.last.append(at)
        for node in reversed(self.nodes):
            below = [self.nodes[child] for child in node.children]
            node.narrow = all(child.narrow and child.unit is not None and not child.unit.attends for child in below)

    def path(self, configuration: int) -> list[int]:
        """The nodes of a configuration from the first to its last, without the root."""
        path, at = [], self.last[configuration]
        while at:
            path.append(at)
            at = self.nodes[at].parent
        return path[::-1]

    def counts(self) -> Counts:
        """The cost of the sweep, and of loops without sharing."""
        parts = [node.unit.part for node in self.nodes if node.unit]
        cost = [0.0]  # of the way to each node
        for node in self.nodes[1:]:
            assert node.unit is not None
            cost.append(cost[node.parent] + node.unit.forwards)
        return Counts(
            configurations=len(self.last),
            attention_forwards=parts.count("attention"),
            mlp_forwards=parts.count("mlp"),
            whole_forwards=parts.count("layer"),
            head_forwards=sum(bool(node.ends) for node in self.nodes),
            kept_layers=sum(cost[last] for last in self.last),
            all_layers=sum(len(configuration.actions) for configuration in self.configurations),
        )

    def steps(self) -> list[tuple[Unit, list[int]]]:
        """The units in the order they are applied, each with the nodes it makes."""
        made: dict[Unit, list[int]] = {}
        for n, node in enumerate(self.nodes):
            if node.unit:
                made.setdefault(node.unit, []).append(n)
        return sorted(made.items(), key=lambda item: (item[0].layer, _ORDER[item[0].part], item[0].weights))
