"""The mesh: its sizes, its layout, and which rows a process feeds."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_lstm import mesh
from flax_lstm.config import ModelConfig, UserError

# Stand-ins for devices and meshes are none in the eyes of the annotation checks.
pytestmark = pytest.mark.usefixtures("as_installed")


def devices(*processes, platform="cpu"):
    """Stand-ins for devices, of the given processes."""
    return [
        SimpleNamespace(process_index=p, id=n, platform=platform)
        for n, p in enumerate(processes)
    ]


def laid_out(sizes, processes):
    """A mesh of stand-ins, as far as `share_of_rows` looks at one."""
    grid = np.array(devices(*processes), dtype=object).reshape(sizes)
    return SimpleNamespace(devices=grid, shape={"data": sizes[0], "model": sizes[1]})


@pytest.mark.parametrize(
    "text", ["", "data", "data=0", "data=-1", "model=2", "data=2;model=2", "data=1.5"]
)
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(UserError, match=r"data=N or data=N,model=M .* got '"):
        mesh.mesh_sizes(text, 8)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"data=3,model=3 needs 9 devices.* are 8"):
        mesh.mesh_sizes("data=3,model=3", 8)


def test_a_mesh_takes_the_first_devices_model_fastest():
    made = mesh.make_mesh("data=2,model=3", jax.devices())
    assert made.devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]
    assert mesh.make_mesh(None, jax.devices()).shape == {"data": 8, "model": 1}


def test_cpus_of_several_processes_do_not_share_units():
    mesh.check_mesh("data=4", devices(0, 0, 1, 1))
    mesh.check_mesh("data=2,model=2", devices(0, 0, 1, 1, platform="gpu"))
    with pytest.raises(UserError, match="give data=N alone"):
        mesh.check_mesh("data=2,model=2", devices(0, 0, 1, 1))


def test_cpus_share_units_only_where_their_exchanges_come_in_order(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--one --two=3")
    mesh.check_mesh("data=4,model=1", devices(0, 0, 0, 0))
    mesh.check_mesh("data=1,model=2", devices(0, 0, platform="tpu"))
    told = f"XLA_FLAGS='--one --two=3 {mesh.IN_ORDER}'"
    with pytest.raises(UserError, match=told):
        mesh.check_mesh("data=1,model=2", devices(0, 0))
    monkeypatch.setenv("XLA_FLAGS", f"{mesh.IN_ORDER} --one")
    mesh.check_mesh("data=2,model=2", devices(0, 0, 0, 0))


def test_no_process_may_be_left_without_a_device():
    with pytest.raises(UserError, match=r"needs 2 devices.* processes \[1\]"):
        mesh.make_mesh("data=2", devices(0, 0, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "processes", "shares"),
    [
        ((4, 1), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((2, 2), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((1, 4), (0, 0, 1, 1), [(0, 1), (0, 1)]),
        ((2, 2), (0, 1, 2, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((8, 1), (0,) * 8, [(0, 1)]),
    ],
)
def test_processes_share_the_rows_by_the_mesh(sizes, processes, shares):
    got = [
        mesh.share_of_rows(laid_out(sizes, processes), p) for p in sorted({*processes})
    ]
    assert got == shares


@pytest.mark.parametrize(
    ("processes", "process"),
    [
        *(((0, 1, 1, 0), 0), ((0, 1, 1, 0), 1), ((0, 1, 1, 1), 1)),
        *(((0, 0, 1, 0), 0), ((0, 0, 0, 1), 0)),
    ],
)
def test_rows_of_a_process_that_do_not_lie_together_are_refused(processes, process):
    with pytest.raises(UserError, match="which do not lie together"):
        mesh.share_of_rows(laid_out((4, 1), processes), process)


def test_the_last_axis_is_shared_by_model():
    made = mesh.make_mesh("data=2,model=4", jax.devices())

    def spec(*shape, by_rows=False):
        like = jax.ShapeDtypeStruct(shape, np.float32)
        return mesh.sharding(made, "w", like, by_rows=by_rows).spec

    assert spec() == P()
    assert spec(8) == P("model")
    assert spec(30, 8) == P(None, "model")
    assert spec(30, 1) == P(None, None)  # the readout
    assert spec(6, 8, by_rows=True) == P("data", "model")
    with pytest.raises(UserError, match="w has 6 columns, which the 4 devices"):
        spec(30, 6)


def test_a_kernel_cannot_be_spread_over_model():
    config = ModelConfig()
    assert mesh.model_over_mesh(config, "data=8") == config
    assert mesh.model_over_mesh(config, "data=2,model=2").implementation == "xla"
    scan = ModelConfig(implementation="scan")
    assert mesh.model_over_mesh(scan, "data=2,model=2") == scan
    with pytest.raises(UserError, match="implementation 'cpu' runs on whole arrays"):
        mesh.model_over_mesh(ModelConfig(implementation="cpu"), "data=2,model=2")
