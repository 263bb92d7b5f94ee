"""Checkpoints against what was saved, bit for bit, and against injected damage."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_lstm import manifest
from flax_lstm.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    CheckpointWarning,
)
from flax_lstm.mesh import make_mesh

# Orbax leaves coroutines behind when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class State(NamedTuple):
    step: jax.Array
    params: dict
    key: jax.Array
    carry: tuple | None


def make_state(seed: int, carry: bool = False) -> State:
    random = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(random.normal(size=(64, 64)), jnp.float32),
        "half": jnp.asarray(random.normal(size=(5,)), jnp.bfloat16),
        "odd": jnp.array([np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "none": jnp.zeros((0, 4), jnp.float32),
    }
    zero = (jnp.ones((2, 2)),) if carry else None
    return State(jnp.int32(seed), params, jax.random.key(seed), zero)


def bits(state: State) -> list:
    plain = state._replace(key=jax.random.key_data(state.key))
    return [
        (np.asarray(x).dtype, x.shape, np.asarray(x).tobytes())
        for x in jax.tree.leaves(plain)
    ]


def template(carry: bool = False):
    return jax.eval_shape(lambda: make_state_traced(carry))


def make_state_traced(carry: bool) -> State:
    params = {
        "kernel": jnp.zeros((64, 64)),
        "half": jnp.zeros((5,), jnp.bfloat16),
        "odd": jnp.zeros((4,)),
        "none": jnp.zeros((0, 4)),
    }
    zero = (jnp.ones((2, 2)),) if carry else None
    return State(jnp.int32(0), params, jax.random.key(0), zero)


def save(folder: Path, metrics: dict[int, float]) -> None:
    with Checkpoints(folder) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, make_state(step), {"epoch": step}, metric=metric)


@pytest.mark.parametrize("carry", [False, True])
def test_a_restored_state_has_the_bits_of_the_saved_one(tmp_path, carry):
    state = make_state(3, carry)
    meta = {"loss": 0.1 + 0.2, "names": ["neg", "pos"], "none": None}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, state, meta, metric=0.5)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        got, got_meta = checkpoints.restore_last(template(carry))
    assert bits(got) == bits(state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert got_meta == meta
    want = jax.random.uniform(state.key, (4,))  # the key is a key, and the same one
    np.testing.assert_array_equal(jax.random.uniform(got.key, (4,)), want)


def test_a_donated_or_changed_buffer_does_not_change_what_is_saved(tmp_path):
    state = {"a": jnp.arange(200_000.0), "b": np.arange(200_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, metric=0.0)
        jax.jit(lambda a: a * 2, donate_argnums=0)(state["a"])
        state["b"][:] = -1
        got, _ = checkpoints.restore_last(
            {"a": jnp.zeros(200_000), "b": np.zeros(200_000)}
        )
    np.testing.assert_array_equal(got["a"], np.arange(200_000.0))
    np.testing.assert_array_equal(got["b"], np.arange(200_000.0))
    assert isinstance(got["b"], np.ndarray)


def test_best_and_last_are_kept_and_nan_is_never_best(tmp_path):
    save(tmp_path, {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.9, 5: 0.6, 6: float("inf")})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == (2, 5, 6)  # 2: the earliest of the equal best
        best, meta = checkpoints.restore_best(template())
        last, _ = checkpoints.restore_last(template())
    assert int(best.step) == 2
    assert meta == {"epoch": 2}
    assert int(last.step) == 6


def test_a_later_process_goes_on_where_the_first_stopped(tmp_path):
    save(tmp_path, {1: 0.9, 2: 0.1, 3: 0.2})
    save(tmp_path, {4: 0.3, 5: 0.4})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (1, 4, 5)
        with pytest.raises(ValueError, match=r"step must be above .*got 5"):
            checkpoints.save(5, make_state(5), {}, metric=0.0)


def array_files(step: Path) -> list[Path]:
    return [p for p in sorted((step / "state").rglob("*")) if p.is_file()]


@pytest.mark.parametrize("where", ["state", "meta"])
def test_every_flipped_bit_is_found_or_harmless(tmp_path, where):
    """41 flips spread over every file of the item; Orbax alone misses most of them."""
    save(tmp_path, {1: 0.5, 2: 0.9})
    want = bits(make_state(2))
    files = [p for p in sorted((tmp_path / "2" / where).rglob("*")) if p.is_file()]
    whole = {p: p.read_bytes() for p in files}
    places = [(p, i) for p in files for i in range(len(whole[p]))]
    detected = 0
    for at in np.linspace(0, len(places) - 1, 41).astype(int):
        path, i = places[at]
        flipped = bytearray(whole[path])
        flipped[i] ^= 1 << int(at) % 8
        path.write_bytes(flipped)
        with (
            warnings.catch_warnings(action="error", category=CheckpointWarning),
            Checkpoints(tmp_path, read_only=True) as checkpoints,
        ):
            try:
                got, meta = checkpoints.restore_last(template())
            except CheckpointWarning:
                detected += 1
            else:
                assert (bits(got), meta) == (want, {"epoch": 2})
        path.write_bytes(whole[path])
    # Most bytes are numbers, or checksums of numbers.
    assert detected >= (30 if where == "state" else 10)


@pytest.mark.filterwarnings("ignore:.*damaged")
@pytest.mark.parametrize("damage", ["half", "empty", "missing"])
def test_a_damaged_file_costs_one_step_at_most(tmp_path, damage):
    save(tmp_path, {1: 0.5, 2: 0.9})
    files = [p for p in sorted((tmp_path / "2").rglob("*")) if p.is_file()]
    for path in files:
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
        for restore in (Checkpoints.restore_last, Checkpoints.restore_best):
            with Checkpoints(tmp_path, read_only=True) as checkpoints:
                got, meta = restore(checkpoints, template())
            assert bits(got) == bits(make_state(meta["epoch"])), path
        path.write_bytes(whole)


def damage(step: Path) -> None:
    data = max(array_files(step), key=lambda p: p.stat().st_size)
    data.write_bytes(bytes(b ^ 1 for b in data.read_bytes()))


def test_a_damaged_step_is_named_and_its_number_can_be_saved_again(tmp_path):
    save(tmp_path, {1: 0.5, 2: 0.9})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(CheckpointWarning, match=r"/2 is damaged: .* skipped"):
            got, _ = checkpoints.restore_last(template())
        assert int(got.step) == 1
        checkpoints.save(2, make_state(2), {"epoch": 2}, metric=0.1)
        got, _ = checkpoints.restore_last(template())
    assert bits(got) == bits(make_state(2))
    assert (tmp_path / "damaged-2-0").is_dir()  # nothing was deleted


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_all_steps_damaged_is_an_error(tmp_path):
    save(tmp_path, {1: 0.5})
    damage(tmp_path / "1")
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"no intact checkpoint in .*\[1\]"),
    ):
        checkpoints.restore_last(template())


@pytest.mark.filterwarnings("ignore:.*not a complete")
def test_foreign_folders_are_skipped_and_orphans_removed(tmp_path):
    save(tmp_path, {1: 0.5})
    (tmp_path / "7").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with pytest.warns(CheckpointWarning, match="/7 is not a complete checkpoint"):
        save(tmp_path, {2: 0.7})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (1, 2)
        got, _ = checkpoints.restore_last(template())
    assert int(got.step) == 2
    assert not (tmp_path / "9.orbax-checkpoint-tmp").exists()
    assert (tmp_path / "7").is_dir()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: p | {"kernel": jnp.zeros((64, 32))},
            r"kernel float32\[64, 64\].*64, 32",
        ),
        (
            lambda p: p | {"half": jnp.zeros((5,))},
            r"params.half bfloat16.*float32\[5\]",
        ),
        (lambda p: p | {"new": jnp.zeros(())}, r"lacks params.new"),
        (lambda p: p | {"odd": None}, r"has params.odd"),
    ],
    ids=["shape", "dtype", "missing", "none"],
)
def test_another_form_is_refused_by_name(tmp_path, change, words):
    save(tmp_path, {1: 0.5, 2: 0.6})
    asked = template()
    asked = asked._replace(params=change(asked.params))
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointMismatchError, match=words),
    ):
        checkpoints.restore_last(asked)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 4)
        save(tmp_path, {1: 0.5})
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointMismatchError, match=r"format 4; .*up to 3"),
    ):
        checkpoints.restore_last(template())


TOPOLOGIES = ("data=1", "data=2", "data=4", "data=1,model=2", "data=2,model=2")


def state_over(mesh: Mesh) -> dict:
    """Returns a state as it lies over a mesh: whole, by rows, by columns, by both."""
    table = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    half = table.astype(ml_dtypes.bfloat16)
    specs = {
        "step": ((), np.int32(7)),
        "whole": ((), table),
        "rows": (("data",), table),
        "columns": ((None, "model"), half),
        "both": (("data", "model"), table),
    }
    return {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        for name, (spec, array) in specs.items()
    }


@pytest.mark.parametrize("saved", TOPOLOGIES)
def test_a_state_over_one_mesh_is_restored_over_any_other(tmp_path, saved):
    """To the bit, and where the template says."""
    state = state_over(make_mesh(saved, jax.devices()[:4]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for restored in TOPOLOGIES:
            like = state_over(make_mesh(restored, jax.devices()[:4]))
            got, _ = checkpoints.restore_last(like)
            for name, leaf in got.items():
                assert leaf.sharding == like[name].sharding
                assert leaf.dtype == state[name].dtype
                assert np.asarray(leaf).tobytes() == np.asarray(state[name]).tobytes()


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from flax_lstm.checkpoint import CheckpointError, Checkpoints
small, big = {"a": jnp.zeros(3)}, {"a": jnp.arange(1_000_000.0)}
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, small, {}, metric=0.0)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        checkpoints.save(2, big, {}, metric=0.0)
except CheckpointError as error:
    print(error)
else:
    print("nothing was said")
with Checkpoints(sys.argv[1], read_only=True) as checkpoints:
    print(checkpoints.steps(), checkpoints.restore_last(small)[0]["a"])
"""


def test_a_full_disk_is_reported_and_leaves_the_earlier_step(tmp_path):
    """A limit on the size of files stands for the disk; the save is asynchronous."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    said = done.stdout.splitlines()
    assert said[0].startswith(f"saving step 2 to {tmp_path} failed"), done.stderr
    assert "step 1 is intact" in said[0]
    assert said[1] == "(1,) [0. 0. 0.]"


def test_bfloat16_survives_as_numpy_too(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": values}, {}, metric=0.0)
        got, _ = checkpoints.restore_last({"a": values})
    assert got["a"].dtype == values.dtype
    np.testing.assert_array_equal(got["a"], values)
