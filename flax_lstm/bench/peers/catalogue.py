"""All implementations by name, ours first."""

from flax_lstm.bench.peers import flax_peers, jax_peers, own, torch_peers
from flax_lstm.bench.peers.base import Implementation

SMOKE = ("ours", "ours-scan", "linen-optimized", "torch")
"""Run by `--smoke`: one of each family."""


def implementations() -> dict[str, Implementation]:
    """Returns them in the order in which tables and plots show them."""
    parts = (own, flax_peers, jax_peers, torch_peers)
    found = [one for part in parts for one in part.implementations()]
    return {one.name: one for one in found}
