"""The leaves of a pytree as named, described and digested host arrays.

What a checkpoint needs to know of a state to give it back bit for bit, and to say by
name what differs when it cannot.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one array of a saved pytree.

    Attributes:
      shape: Its shape.
      dtype: Name of the dtype of the stored numbers.
      key: The key dtype where the leaf holds typed PRNG keys, else None.
      sha256: Hex digest of its bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    key: str | None = None
    sha256: str = ""

    def form(self) -> str:
        """Returns shape and dtype in words, for messages.

        >>> Leaf((3, 4), "float32").form()
        'float32[3, 4]'
        """
        kind = f"{self.key} as " if self.key else ""
        return f"{kind}{self.dtype}{list(self.shape)}"


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a pytree with dotted names; None is not a leaf.

    >>> named_leaves({"a": [1.0, None], "b": 2.0})
    [('a.0', 1.0), ('b', 2.0)]
    """
    flat = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in flat]
    if len(set(names)) != len(names):
        raise ValueError(f"two leaves have one dotted name: {sorted(names)}.")
    return [
        (name or "value", leaf) for name, (_, leaf) in zip(names, flat, strict=True)
    ]


def is_key(leaf: Any) -> bool:
    """Says whether a leaf is an array of typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def describe(template: Any) -> tuple[dict[str, Leaf], tuple[list, Any]]:
    """Returns the leaves a template asks for by name, and its names and structure."""
    pairs = named_leaves(template)
    leaves = {}
    for name, leaf in pairs:
        key = str(leaf.dtype) if is_key(leaf) else None
        if key:
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        leaves[name] = Leaf(tuple(leaf.shape), str(leaf.dtype), key)
    return leaves, (pairs, jax.tree.structure(template))


def to_host(state: Any) -> tuple[dict[str, np.ndarray], dict[str, Leaf]]:
    """Copies every leaf to the host, by name, and describes it but for its digest.

    Leaves that are spread over several processes are whole in each of them afterwards.
    """
    arrays, leaves = {}, {}
    for name, leaf in named_leaves(state):
        key = str(leaf.dtype) if is_key(leaf) else None
        leaf = jax.random.key_data(leaf) if key else leaf
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):  # parts of it are in other processes
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        # A copy: nothing the caller does can reach what the background still writes.
        array = np.array(leaf)
        arrays[name] = array
        leaves[name] = Leaf(array.shape, str(array.dtype), key)
    return arrays, leaves


def with_digest(leaf: Leaf, array: np.ndarray) -> Leaf:
    """Returns the description of an array with its digest."""
    return dataclasses.replace(leaf, sha256=digest(array))


def place(array: np.ndarray, leaf: Leaf, like: Any, dtype: str) -> Any:
    """Turns a stored array into the kind of leaf the template has, on its devices.

    Args:
      array: As it was stored.
      leaf: What is known of it.
      like: The template's leaf.
      dtype: To convert the numbers to; mostly they have it already.
    """
    array = array.astype(jnp.dtype(dtype), copy=False)
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array
    value: Any = jnp.array(array)
    if leaf.key:
        value = jax.random.wrap_key_data(value, impl=GENERATORS[leaf.key])
    sharding = getattr(like, "sharding", None)
    return (
        jax.device_put(value, sharding)
        if isinstance(sharding, NamedSharding)
        else value
    )


GENERATORS = {
    "key<fry>": "threefry2x32",
    "key<rbg>": "rbg",
    "key<urbg>": "unsafe_rbg",
}
"""The generator that `wrap_key_data` takes, by the dtype of its keys."""


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def digest_json(value: Any) -> str:
    """Returns the SHA-256 of JSON data, whatever its spacing and order of names."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
