"""Digests against published vectors; names and forms of leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_lstm import leaves


def test_the_digest_is_sha256_of_the_bytes():
    """The test vectors of FIPS 180-4 for "abc" and for the empty string."""
    abc = np.frombuffer(b"abc", np.uint8)
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert leaves.digest(abc) == want
    assert leaves.digest(np.zeros(0, np.float32)).startswith("e3b0c44298fc1c149afbf4c8")


def test_the_digest_sees_values_and_not_strides():
    array = np.arange(12.0).reshape(3, 4)
    assert leaves.digest(array.T) == leaves.digest(np.ascontiguousarray(array.T))
    assert leaves.digest(array) != leaves.digest(array.T)
    assert leaves.digest(np.array([0.0])) != leaves.digest(np.array([-0.0]))


def test_the_digest_of_json_is_blind_to_order_only():
    assert leaves.digest_json({"a": 1, "b": [2]}) == leaves.digest_json(
        {"b": [2], "a": 1}
    )
    assert leaves.digest_json({"a": [1, 2]}) != leaves.digest_json({"a": [2, 1]})


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_generator_come_back_as_they_were(generator):
    key = jax.random.split(jax.random.key(3, impl=generator), 2)
    arrays, saved = leaves.to_save({"k": key})
    wanted, _ = leaves.describe(jax.eval_shape(lambda: {"k": key}))
    assert saved["k"].form() == wanted["k"].form()
    back = leaves.place(arrays["k"], saved["k"], key, saved["k"].dtype)
    assert back.dtype == key.dtype
    np.testing.assert_array_equal(jax.random.bits(back[0]), jax.random.bits(key[0]))


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"one dotted name.*'a\.b', 'a\.b'"):
        leaves.named_leaves({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})


PLACES = {"0:2,0:3": slice(0, 2), "2:4,0:3": slice(2, 4)}


def test_an_array_agrees_with_the_digests_of_all_its_parts_alone():
    array = np.arange(12.0).reshape(4, 3)
    parts = {place: leaves.digest(array[at]) for place, at in PLACES.items()}
    leaf = leaves.Leaf(array.shape, "float64", None, parts)
    assert leaves.agrees(array, leaf)
    for at in np.ndindex(array.shape):
        changed = array.copy()
        changed[at] = np.nextafter(changed[at], np.inf)
        assert not leaves.agrees(changed, leaf)
    for place in PLACES:  # a part that nobody digested
        missing = {other: sha256 for other, sha256 in parts.items() if other != place}
        leaf = leaves.Leaf(array.shape, "float64", None, missing)
        assert not leaves.agrees(array, leaf)
    whole = leaves.Leaf(array.shape, "float64", None, leaves.digest(array))
    assert leaves.agrees(array, whole)
    assert not leaves.agrees(array + 1, whole)


def test_the_parts_of_every_layout_are_the_whole(mesh_of_four):
    array = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    for spec, places in (
        ((), ["0:4,0:2"]),
        (("data",), ["0:2,0:2", "2:4,0:2"]),
        ((None, "model"), ["0:4,0:1", "0:4,1:2"]),
        (("data", "model"), ["0:2,0:1", "0:2,1:2", "2:4,0:1", "2:4,1:2"]),
    ):
        where = NamedSharding(mesh_of_four, PartitionSpec(*spec))
        digests = leaves.own_digests(jax.device_put(array, where))
        assert sorted(digests) == places
        leaf = leaves.Leaf(array.shape, "float32", None, digests)
        assert leaves.agrees(array, leaf)


def test_of_copies_that_differ_the_first_is_digested_as_it_is_saved(mesh_of_four):
    array = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    copies = [
        jax.device_put(array + n, device)
        for n, device in enumerate(mesh_of_four.devices.flat)
    ]
    where = NamedSharding(mesh_of_four, PartitionSpec())
    whole = jax.make_array_from_single_device_arrays(array.shape, where, copies)
    assert leaves.own_digests(whole) == {"0:4,0:2": leaves.digest(array)}


@pytest.fixture
def mesh_of_four() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
