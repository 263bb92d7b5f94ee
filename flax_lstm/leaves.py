"""The leaves of a pytree as named, described and digested arrays.

What a checkpoint needs to know of a state to give it back bit for bit, and to say by
name what differs when it cannot.

Part     What one process saves, and digests, of a leaf that several processes have. Its
         place is written as "0:4,8:16", the range along each axis.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one array of a saved pytree.

    Attributes:
      shape: Its shape.
      dtype: Name of the dtype of the stored numbers.
      key: The key dtype where the leaf holds typed PRNG keys, else None.
      sha256: Hex digest of its bytes; or those of its parts, by their places.
    """

    shape: tuple[int, ...]
    dtype: str
    key: str | None = None
    sha256: str | dict[str, str] = ""

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


def to_save(
    state: Any,
) -> tuple[dict[str, np.ndarray | jax.Array], dict[str, Leaf]]:
    """Returns every leaf by name, and describes it but for its digest.

    Leaves of this process alone are copied to the host. Those of several processes stay
    where they are, so that each can save its parts; nothing is gathered.
    """
    arrays, leaves = {}, {}
    for name, leaf in named_leaves(state):
        key = str(leaf.dtype) if is_key(leaf) else None
        leaf = jax.random.key_data(leaf) if key else leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            array = cut(leaf) if leaf.is_fully_replicated else leaf
        else:
            # A copy: nothing the caller does can reach what is still being written.
            array = np.array(leaf)
        arrays[name] = array
        leaves[name] = Leaf(tuple(array.shape), str(array.dtype), key)
    return arrays, leaves


def cut(leaf: jax.Array) -> jax.Array:
    """Returns an array that each process has whole as one of which each has a part.

    It stays as it is where no axis can be cut evenly.
    """
    by_id = sorted(leaf.sharding.device_set, key=lambda device: -device.id)
    devices = {device.process_index: device for device in by_id}
    axes = [n for n, size in enumerate(leaf.shape) if size and not size % len(devices)]
    if not axes:
        return leaf
    mesh = Mesh(np.array([devices[process] for process in sorted(devices)]), ("part",))
    where = NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "part"))
    whole = np.asarray(leaf.addressable_data(0))
    return jax.make_array_from_callback(leaf.shape, where, lambda at: whole[at])


def own_digests(array: jax.Array) -> dict[str, str]:
    """Returns the digests of the parts that this process saves, by their places."""
    digests = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:  # of equal parts, the one that is saved
            ranges = [
                slice(*at.indices(size))
                for at, size in zip(shard.index, array.shape, strict=True)
            ]
            place = ",".join(f"{at.start}:{at.stop}" for at in ranges)
            digests[place] = digest(np.asarray(shard.data))
    return digests


def agrees(array: np.ndarray, leaf: Leaf) -> bool:
    """Says whether an array is, to the bit, the one whose digests a leaf has."""
    if isinstance(leaf.sha256, str):
        return digest(array) == leaf.sha256
    seen = 0
    for place, sha256 in leaf.sha256.items():
        ranges = [at.split(":") for at in place.split(",")]
        part = array[tuple(slice(int(start), int(stop)) for start, stop in ranges)]
        seen += part.size
        if digest(part) != sha256:
            return False
    return seen == array.size


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
