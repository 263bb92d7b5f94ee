"""What runs on which device, and what is said of it; no device is here, but by name."""

import jax
import jax.numpy as jnp
import pytest
from flax_lstm_kernels import cpu, gpu
from flax_lstm_kernels.target import Target, current, on

from flax_lstm import LSTMParams, explain, init_lstm_params, lstm


def arguments(hidden=64, dtype=jnp.bfloat16):
    like = jax.ShapeDtypeStruct
    shapes = (8, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)
    params = LSTMParams(*(like(shape, jnp.float32) for shape in shapes))
    return params, jnp.zeros((5, 16, 8), dtype)


def told(platform, kind=None, *, hidden=64, dtype=jnp.bfloat16, asked=None, **options):
    params, x = arguments(hidden)
    with on(platform, kind):
        return explain(params, x, implementation=asked, dtype=dtype, **options)


def test_the_default_device_is_the_one_that_is_here():
    assert current() == Target("cpu", "cpu")
    with on("tpu", "TPU v4"):
        assert current() == Target("tpu", "TPU v4", named=True)


def test_none_runs_the_kernel_of_a_tpu_and_says_it_never_ran():
    found = told("tpu", "TPU v6e")
    assert found.implementation == "pallas"
    assert str(found).startswith("pallas: runs; not yet run on hardware, on several")
    assert 'the device is "tpu"' in found.reasons["cudnn"]
    assert 'the device is "tpu"' in found.reasons["cpu"]
    assert found.reasons["xla"] == 'could run, but "pallas" is faster'


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        (("cpu", "cpu"), {}, 'no kernel for "cpu"'),
        (("rocm", "gfx942"), {}, 'no kernel for "rocm"'),
        (("tpu", "TPU v2"), {}, "knows the devices"),
        (("tpu", "TPU v5e"), {"dtype": jnp.float16}, "computation dtype is float16"),
        (("tpu", "TPU v5e"), {"hidden": 4096}, "hidden sizes of 1 to 2048"),
        (("cuda", "8.0"), {}, "compute capability 9.0 (Hopper); this is 8.0"),
    ],
)
def test_why_the_kernel_of_an_accelerator_cannot_run(device, options, reason):
    found = told(*device, **options)
    assert found.implementation in ("xla", "cpu")
    assert reason in found.reasons["pallas"]
    refused = told(*device, asked="pallas", **options)
    assert refused.implementation is None
    assert str(refused).startswith("pallas: ")


def test_none_runs_the_one_block_kernel_of_a_gpu_and_no_other_that_never_ran(
    monkeypatch,
):
    found = told("cuda", "9.0")
    assert found.implementation == "pallas"
    assert found.note == "not yet run on hardware"
    plan = gpu.support("9.0", jnp.bfloat16, 64).plan
    for kernel in ("cluster", "grid", "step"):
        support = gpu.Support(None, plan._replace(kernel=kernel))
        monkeypatch.setattr(gpu, "support", lambda *_, s=support, **__: s)
        found = told("cuda", "9.0")
        assert found.implementation == "xla"
        assert f'"{kernel}" has not yet run on hardware' in found.reasons["pallas"]
        assert told("cuda", "9.0", asked="pallas").implementation == "pallas"


def test_sizes_of_0_are_refused():
    params, x = arguments()
    with on("tpu", "TPU v4"):
        assert "above 0 only" in explain(params, x[:0]).reasons["pallas"]
    with on("cuda", "8.0"):
        empty = explain(params, x[:0], dtype=jnp.float32)
        assert "above 0 only" in empty.reasons["cudnn"]


def test_float32_on_a_gpu_is_tf32_and_needs_to_be_allowed():
    found = told("cuda", "9.0", dtype=jnp.float32, asked="pallas")
    assert found.implementation == "pallas"
    assert "multiplied as tf32" in found.note
    assert "tf32" not in told("cuda", "9.0", asked="pallas").note
    for precision in ("float32", "highest"):
        with jax.default_matmul_precision(precision):
            found = told("cuda", "9.0", dtype=jnp.float32, asked="pallas")
            assert found.implementation is None
            assert f'"{precision}") does not' in found.reasons["pallas"]
            assert told("cuda", "9.0", asked="pallas").implementation == "pallas"


def test_an_interpreted_kernel_runs_only_where_it_is_asked_for():
    params, x = arguments()
    with on("tpu", "TPU v5e", interpret=True):
        found = explain(params, x)
        assert found.implementation == "xla"
        assert "interpreted" in found.reasons["pallas"]
        asked = explain(params, x, implementation="pallas")
        assert asked.implementation == "pallas"


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        (("cpu", "cpu"), {}, "needs a CUDA device"),
        (("cuda", "9.0"), {"dtype": jnp.bfloat16}, "float32 only"),
        (("cuda", "9.0"), {"dtype": jnp.float64}, "float32 only"),
        (("cuda", "9.0"), {"resets": jnp.zeros((5, 16), bool)}, "no resets"),
    ],
)
def test_why_cudnn_cannot_run(x64, device, options, reason):
    found = told(*device, asked="cudnn", **{"dtype": jnp.float32, **options})
    assert found.implementation is None
    assert reason in found.reasons["cudnn"]


def test_cudnn_runs_where_it_is_asked_for():
    found = told("cuda", "8.0", dtype=jnp.float32)
    assert found.implementation == "xla"
    assert "no vmap and no forward mode" in found.reasons["cudnn"]
    params = init_lstm_params(jax.random.key(0), 8, 64)
    x = jnp.zeros((5, 16, 8))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("rows",))
    spec = jax.sharding.PartitionSpec(None, "rows")

    def inside(x):
        with pytest.raises(NotImplementedError, match="shard_map"):
            lstm(params, x, implementation="cudnn")
        return x

    with on("cuda", "8.0"):
        jax.eval_shape(
            jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec), x
        )


def test_a_kernel_of_the_cpu_that_is_not_asked_for_is_not_compiled(monkeypatch):
    monkeypatch.setattr(cpu, "reason", lambda: pytest.fail("looked at"))
    found = told("cpu", dtype=jnp.float32, asked="scan")
    assert found.reasons["cpu"] == 'could run, but "scan" was asked for'
    assert told("tpu", "TPU v4").implementation == "pallas"
