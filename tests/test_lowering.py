"""What the primitives become: on several devices, and in modules for other machines."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels import cpu, gpu, tpu
from flax_lstm_kernels.target import Target, on
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_lstm import LSTMParams, init_lstm_params, lowering, lstm

needs_kernel = pytest.mark.skipif(
    cpu.compiler() is None, reason="the kernel of the CPU needs a C++ compiler"
)
ROWS = P(None, "rows")
SPECS = {"x": ROWS, "lengths": P("rows"), "resets": ROWS}


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(jax.devices()[:4], ("rows",))


@pytest.fixture
def given():
    keys = jax.random.split(jax.random.key(0), 3)
    return init_lstm_params(keys[0], 3, 5), {
        "x": jax.random.normal(keys[1], (6, 8, 3)),
        "lengths": jnp.array([6, 1, 0, 3, 4, 5, 6, 2]),
        "resets": jax.random.bernoulli(keys[2], 0.3, (6, 8)),
    }


def loss(params, batch, implementation="cpu"):
    (c, _), y = lstm(
        params,
        batch["x"],
        lengths=batch["lengths"],
        resets=batch["resets"],
        implementation=implementation,
    )
    return jnp.sum(jnp.sin(y)) + jnp.sum(c**2)


def gradients(params, x, batch):
    return jax.grad(lambda p, x: loss(p, {**batch, "x": x}), (0, 1))(params, x)


def close(got, want):
    """The same products and sums over rows, in another order: a few roundings."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_inside_shard_map_each_device_runs_its_rows(given, mesh):
    params, batch = given

    def total(params, batch):
        def of_rows(params, batch):
            return jax.lax.psum(loss(params, batch), "rows")

        run = jax.shard_map(
            of_rows, mesh=mesh, in_specs=(P(), SPECS), out_specs=P(), check_vma=True
        )
        return run(params, batch)

    run = jax.jit(jax.grad(total)).lower(params, batch)
    assert run.as_text().count("@flax_lstm_cpu_backward") == 1
    close(run.compile()(params, batch), jax.grad(loss)(params, batch))


@needs_kernel
def test_inside_shard_map_the_weights_may_be_what_differs(given, mesh):
    params, batch = given
    scales = jnp.arange(1.0, 5.0)

    def of_device(scale, params):
        params = jax.tree.map(lambda leaf: leaf * scale[0], params)
        return jax.grad(loss)(params, batch).bias[None]

    run = jax.shard_map(
        of_device, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows")
    )
    got = run(scales, params)
    for scale, bias in zip(scales, got, strict=True):
        scaled = jax.tree.map(lambda leaf, scale=scale: leaf * scale, params)
        close(bias, jax.grad(loss)(scaled, batch).bias)


@needs_kernel
def test_under_pmap_each_device_runs_its_rows(given):
    params, batch = given
    parts = {
        "x": batch["x"].reshape(6, 4, 2, 3),
        "lengths": batch["lengths"].reshape(4, 2),
        "resets": batch["resets"].reshape(6, 4, 2),
    }

    def gradient(params, batch):
        return jax.lax.psum(jax.grad(loss)(params, batch), "rows")

    axes = {"x": 1, "lengths": 0, "resets": 1}
    run = jax.pmap(gradient, "rows", in_axes=(None, axes), devices=jax.devices()[:4])
    assert run.lower(params, parts).as_text().count("@flax_lstm_cpu_backward") == 1
    got = jax.tree.map(lambda leaf: leaf[0], run(params, parts))
    close(got, jax.grad(loss)(params, batch))


@needs_kernel
def test_a_batch_sharded_under_jit_is_not_gathered(given, mesh):
    params, batch = given
    placed = {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name]))
        for name, leaf in batch.items()
    }
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    run = jax.jit(gradients).lower(whole, placed["x"], placed).compile()
    program = run.as_text()
    assert "all-gather" not in program
    assert program.count('custom_call_target="flax_lstm_cpu') == 2
    got = run(whole, placed["x"], placed)
    assert got[1].sharding.spec == ROWS
    close(got, gradients(params, batch["x"], batch))


@needs_kernel
def test_where_the_rows_are_not_sharded_nothing_is_added_up(given, mesh):
    params, batch = given
    whole = jax.device_put((params, batch), NamedSharding(mesh, P()))
    got = jax.jit(gradients)(whole[0], whole[1]["x"], whole[1])
    close(got, gradients(params, batch["x"], batch))


def exported(platform, params, batch, implementation=None, dtype=jnp.float32):
    def gradient(params, x):
        def loss(params, x):
            lengths, resets = batch["lengths"], batch["resets"]
            final, y = lstm(
                params,
                x,
                lengths=lengths,
                resets=resets,
                implementation=implementation,
                dtype=dtype,
            )
            return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(final.c)

        return jax.grad(loss, (0, 1))(params, x)

    run = jax.export.export(jax.jit(gradient), platforms=[platform])
    return run(params, batch["x"]).mlir_module()


@needs_kernel
def test_a_module_exported_for_a_tpu_holds_its_kernels(given):
    assert exported("tpu", *given).count("@tpu_custom_call") == 2


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("device", "dtype", "call"),
    [
        (("tpu", "TPU v5e"), "float32", "@tpu_custom_call"),
        (("tpu", "TPU v5e"), "bfloat16", "@tpu_custom_call"),
        (("cuda", "9.0"), "float32", "@mosaic_gpu_v2"),
        (("cuda", "9.0"), "bfloat16", "@mosaic_gpu_v2"),
    ],
)
def test_a_module_for_a_named_device_holds_its_kernels(given, device, dtype, call):
    with on(*device):
        module = exported(device[0], *given, "pallas", jnp.dtype(dtype))
    assert module.count(call) == 2


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("device", "call"),
    [
        (("tpu", "TPU v5e"), "@tpu_custom_call"),
        (("cuda", "9.0"), "@mosaic_gpu_v2"),
    ],
)
def test_a_module_for_several_devices_holds_kernels_inside_shard_map(
    given, mesh, device, call
):
    params, batch = given

    def total(params, batch, implementation="pallas"):
        return jnp.sum(loss(params, batch, implementation))

    def divided(params, batch):
        def of_rows(params, batch):
            return jax.lax.psum(total(params, batch), "rows")

        run = jax.shard_map(of_rows, mesh=mesh, in_specs=(P(), SPECS), out_specs=P())
        return run(params, batch)

    def count(function):
        specs = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        run = jax.jit(
            jax.grad(function), in_shardings=(NamedSharding(mesh, P()), specs)
        )
        with on(*device):
            module = jax.export.export(run, platforms=device[:1])(params, batch)
        return module.mlir_module().count(call)

    assert count(divided) == 2
    # Of a module that XLA divides it divides the statement, but not in silence.
    assert count(partial(total, implementation=None)) == 0
    with pytest.raises(NotImplementedError, match="exported for 4 devices that XLA"):
        count(total)


def test_a_module_for_any_gpu_holds_no_kernel_of_one(given):
    assert "mosaic_gpu" not in exported("cuda", *given)


def test_16_bits_follow_the_statement_where_there_is_no_kernel(given):
    params, batch = given

    def derivatives(implementation):
        def of(params, x):
            final, y = lstm(
                params,
                x,
                lengths=batch["lengths"],
                resets=batch["resets"],
                implementation=implementation,
                dtype=jnp.float16,
            )
            return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(final.c)

        def first_and_second(params, x):
            tangents = jax.tree.map(jnp.cos, (params, x))
            return jax.jvp(jax.grad(of, (0, 1)), (params, x), tangents)

        return jax.jit(first_and_second)(params, batch["x"])

    with on("cuda", "9.0"):
        found = derivatives("pallas")
    want = derivatives("xla")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # Two programs that round to 11 bits, in different places.
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


@pytest.mark.kernels
@pytest.mark.parametrize("device", [("tpu", "TPU v5e"), ("cuda", "9.0")])
def test_arrays_of_more_than_2_to_the_31_elements_are_lowered(device):
    def like(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = LSTMParams(like(8, 256), like(64, 256), like(256))
    x = like(8192, 4096, 8)
    assert x.shape[0] * x.shape[1] * params.bias.shape[0] > 2**31

    def gradient(params, x):
        def total(params):
            _, y = lstm(params, x, implementation="pallas")
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(total)(params)

    with on(*device):
        run = jax.export.export(jax.jit(gradient), platforms=device[:1])
        module = run(params, x).mlir_module()
    assert "8192x4096x256x" in module
    assert module.count("stablehlo.custom_call @") == 2


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        (tpu, "float32"),
        (tpu, "bfloat16"),
        (gpu, "float32"),
        (gpu, "bfloat16"),
        (gpu, "float16"),
    ],
)
def test_gates_are_kept_in_the_dtype_that_is_expected(module, dtype):
    like, dtype = jax.ShapeDtypeStruct, jnp.dtype(dtype)
    arguments = (
        like((2, 8, 3), dtype),
        like((3, 256), dtype),
        like((64, 256), dtype),
        like((256,), dtype),
        like((8, 64), jnp.float32),
        like((8, 64), dtype),
        like((8,), jnp.int32),
        like((0, 0), jnp.uint8),
    )
    *_, gates, before = jax.eval_shape(
        lambda *arrays: module.forward(*arrays, reverse=False, keep=True), *arguments
    )
    target = Target({tpu: "tpu", gpu: "cuda"}[module])
    assert gates.dtype == lowering.gates_dtype(target, dtype)
    assert before.dtype == jnp.float32
