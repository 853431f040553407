"""What a fused network calls, counted."""

from __future__ import annotations

from collections import Counter

from torch import nn

from bnext.drawn_in import TakesDrawnIn
from bnext.networks.tracing import trace


def counts(network: nn.Module) -> dict[str, int]:
    """Of what a fused network of one input calls, by the graph of its forward."""
    graph = trace(network, 1)
    assert graph is not None
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            layer = network.get_submodule(node.target)
            if isinstance(layer, TakesDrawnIn):
                residual, name, _ = node.kwargs.get(
                    "drawn_in", (None, getattr(layer, "activation", None), None)
                )
                found["norm" + "+add" * (residual is not None) + f"+{name}" * bool(name)] += 1
            elif isinstance(layer, nn.ReLU | nn.LeakyReLU | nn.SiLU | nn.Hardswish):
                found["activation"] += 1
        elif "add" in str(node.target):
            found["add"] += 1
        elif "relu" in str(node.target):
            found["activation"] += 1
    return dict(found)
