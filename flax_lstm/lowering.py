"""What the primitives of `foreign` become on each platform: a kernel, or the statement.

A kernel stands in for the statement where one exists for the platform of the program
that is being made, and supports what is asked of it. The kernels of accelerators end
going backward with dz, the gradient of the gates before activation; those of weights,
bias and inputs are a product each of it, over all steps, made here.

Axes     As in `statement`.
Sharded  Rows are independent: on several devices under `jax.jit`, a kernel runs on the
         rows that each of them holds. Sums over rows are added up over the devices. On
         TPUs, where only `jax.shard_map` can do this, XLA divides the statement, or
         where the kernel was asked for by name, that is an error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Neither is public. Kernels are traced as if outside of `jax.shard_map`, which would
# else demand of every array inside them that it name the mesh axes it varies over; and
# `custom_partitioning` must be told the devices, also where it is met in a lowering.
from jax._src.config import _check_vma
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.experimental import io_callback
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_lstm.loop import live_steps, select
from flax_lstm.statement import previous

PLATFORMS = ("cpu", "cuda", "tpu")
# Which axis of each argument and of each result of the loop forward, and of the kernels
# backward, the rows are on; None for weights.
FORWARD_ROWS = ((1, None, None, None, 0, 0, 0, 1), (1, 0, 0, 1, 1))
BACKWARD_ROWS = ((1, 0, 0, 1, 1, None, 0, 1), (1, 0, 0))
CPU_BACKWARD_ROWS = (
    (1, 0, 0, 1, None, None, 0, 1, 1, 1, 0, 1),
    (1, None, None, None, 0, 0),
)
# The dtype of the kept gates, by platform and computation dtype, where not float32.
GATES = {("cuda", "bfloat16"): "float16", ("cuda", "float16"): "float16"}


def gates_dtype(target: Any, dtype: Any) -> str:
    """Returns the name of the dtype in which the kernel of a target keeps the gates."""
    return GATES.get((target.platform, jnp.dtype(dtype).name), "float32")


class Kernels(NamedTuple):
    """The kernels that stand in for the statements of the same names.

    Attributes:
      forward: Called with the arguments of `statement.forward`, and `shared`.
      transposed: With those of `statement.transposed`, and `shared`.
    """

    forward: Callable[..., Any]
    transposed: Callable[..., Any]


def kernels_for(
    platform: str | None, target: Any, sizes: Any, dtype: Any, *, exported: bool
) -> Kernels | None:
    """Returns what stands in for the statements; None where nothing does.

    Args:
      platform: Of the program that is being made; None for any other.
      target: Device that the implementation was chosen for.
      sizes: T, B, I and H.
      dtype: Computation dtype.
      exported: Whether the program is to run elsewhere.
    """
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    steps, rows, inputs, hidden = sizes
    if target.interpret:
        platform = target.platform
    known = target.platform == platform and (target.named or not exported)
    kind = target.kind if known else None
    if platform == "cpu":
        from flax_lstm_kernels import cpu

        # An exported module may run where there is no compiler.
        if exported or dtype != jnp.float32 or cpu.reason():
            return None
        return Kernels(cpu_forward, cpu_transposed)
    if platform == "tpu":
        from flax_lstm_kernels import tpu

        if tpu.support(kind, dtype, hidden, steps=steps, rows=rows, inputs=inputs)[0]:
            return None
        module, options = tpu, {"kind": kind}
    # The program for any GPU must run on those that are no Hopper, too.
    elif platform == "cuda" and known:
        from flax_lstm_kernels import gpu

        if gpu.support(kind, dtype, hidden, steps=steps, rows=rows)[0]:
            return None
        module, options = gpu, {}
    else:
        return None
    if target.interpret:
        options["interpret"] = True
    return Kernels(
        partial(accelerator_forward, module, options),
        partial(accelerator_transposed, module, options),
    )


def cpu_forward(*arrays, shared, gates_dtype, **options):
    """Calls the C++ loop forward."""
    from flax_lstm_kernels import cpu

    del gates_dtype  # float32, as all else
    x, *weights, c, h, lengths, resets = arrays
    weights = (leaf.astype(x.dtype) for leaf in weights)
    call = shared(partial(cpu.forward, **options), *FORWARD_ROWS)
    return call(x, *weights, c, h, lengths, resets)


def cpu_transposed(*arrays, shared, **options):
    """Calls the C++ loop backward, which makes the products too."""
    from flax_lstm_kernels import cpu

    d_hs, d_c, d_h, x, kernel, recurrent_kernel, *others = arrays
    weights = kernel.astype(x.dtype), recurrent_kernel.astype(x.dtype)
    call = shared(partial(cpu.backward, **options), *CPU_BACKWARD_ROWS)
    outs = call(d_hs, d_c, d_h, x, *weights, *others)
    return [outs[0], *cast_weights(outs[1:4], kernel, recurrent_kernel), *outs[4:]]


def in_32_bits(run: Callable) -> Callable:
    """Has integers of Python become int32 in a kernel, also where x64 is enabled.

    Arrays keep their dtypes, none of which has 64 bits but those of weights.
    """

    def narrow(*arrays: Any, **options: Any) -> Any:
        with jax.enable_x64(False):
            return run(*arrays, **options)

    return narrow


def accelerator_forward(module, given, *arrays, shared, gates_dtype, **options):
    """Calls the kernel of a TPU or GPU forward."""
    call = shared(
        partial(in_32_bits(module.forward), **options, **given), *FORWARD_ROWS
    )
    hs, c, h, gates, before = call(*arrays)
    return [hs, c, h, gates.astype(gates_dtype), before]


def accelerator_transposed(
    module,
    given,
    d_hs,
    d_c,
    d_h,
    x,
    kernel,
    recurrent_kernel,
    h,
    hs,
    gates,
    before,
    lengths,
    resets,
    *,
    shared,
    reverse,
    of_inputs,
):
    """Calls the kernel of a TPU or GPU backward, and makes the products."""
    dtype, platform = x.dtype, module.__name__.split(".")[-1]
    wide = jnp.float32
    gates = gates.astype(GATES.get((PLATFORM_OF[platform], dtype.name), "float32"))
    backward = partial(in_32_bits(module.backward), reverse=reverse, **given)
    call = shared(backward, *BACKWARD_ROWS)
    rounded = recurrent_kernel.astype(dtype)
    d_z, d_c, d_h = call(
        d_hs, d_c, d_h.astype(wide), gates, before, rounded, lengths, resets
    )
    # A TPU would round float32 operands to bfloat16, unlike its kernel. A GPU rounds
    # them to tf32, like its kernel.
    exact = platform == "tpu" and dtype == wide
    product = partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=wide,
    )
    x = select(live_steps(x.shape[0], lengths), x, 0)
    h_before = previous(hs, h, lengths, resets, reverse=reverse)
    operand = d_z.astype(dtype)
    d_x = jnp.zeros((0, 0, 0), dtype)
    if of_inputs:
        d_x = product("tbg,ig->tbi", operand, kernel.astype(dtype)).astype(dtype)
        if platform == "gpu" and x.size < kernel.size:
            # First: of so few rows XLA cuts up the sum over gates, and has the parts,
            # each as large as d_x, in float32. They are then where later results will
            # be. Of more rows it would only fill up the operand once more.
            operand, d_x = lax.optimization_barrier((operand, d_x))
    d_kernel = product("tbi,tbg->ig", x, operand).astype(kernel.dtype)
    if platform == "gpu":
        # Else XLA makes one product of both: it copies x and h side by side, and has
        # all of the result in float32 at once.
        h_before, d_kernel = lax.optimization_barrier((h_before, d_kernel))
    weights = (
        d_kernel,
        product("tbh,tbg->hg", h_before, operand),
        jnp.sum(d_z, (0, 1), dtype=wide),
    )
    weights = cast_weights(weights, kernel, recurrent_kernel)
    return [d_x, *weights, d_c, d_h.astype(dtype)]


PLATFORM_OF = {"tpu": "tpu", "gpu": "cuda"}


def cast_weights(gradients, kernel, recurrent_kernel):
    """Casts the gradients of kernel, recurrent kernel and bias to the weights' dtypes.

    The bias' is that of the kernel: see `foreign.recurrence`.
    """
    likes = kernel, recurrent_kernel, kernel
    return [d.astype(like.dtype) for d, like in zip(gradients, likes, strict=True)]


def over_devices(call: Callable, arrays_rows: Any, outs_rows: Any) -> Callable:
    """Has each device call a function of arrays on the rows that it holds.

    Args:
      call: The function; its results without rows are sums over them.
      arrays_rows: Which axis of each argument the rows are on; None for weights.
      outs_rows: The same of each result.
    """

    def run(*arrays: Any) -> Any:
        whole = custom_partitioning(lambda *arrays: tuple(call(*arrays)))

        def factors(prefix: str, array: Any, rows: int | None) -> str:
            return " ".join(
                "rows" if axis == rows and array.size else f"{prefix}{axis}"
                for axis in range(array.ndim)
            )

        outs = jax.eval_shape(call, *arrays)
        left = [
            factors(f"in{n}x", array, rows)
            for n, (array, rows) in enumerate(zip(arrays, arrays_rows, strict=True))
        ]
        right = [
            factors(f"out{n}x", out, rows)
            for n, (out, rows) in enumerate(zip(outs, outs_rows, strict=True))
        ]
        names = " ".join([*left, *right]).split()
        whole.def_partition(
            partition,
            sharding_rule=f"{', '.join(left)} -> {', '.join(right)}",
            need_replication_factors=tuple(n for n in names if n != "rows"),
        )
        return whole(*arrays)

    def partition(mesh: Any, arrays: Any, outs: Any) -> Any:
        spec = arrays[0].sharding.spec
        axes = spec[1] if len(spec) > 1 else None

        def places(arrays: Any, rows: Any) -> Any:
            return tuple(
                NamedSharding(
                    mesh,
                    PartitionSpec(
                        *[
                            axes if axis == row and 0 not in array.shape else None
                            for axis in range(len(array.shape))
                        ]
                    ),
                )
                for array, row in zip(arrays, rows, strict=True)
            )

        def local(*arrays: Any) -> Any:
            results = closed_p.bind(*arrays, call=call)
            if axes is None:
                return tuple(results)
            # What is here is a device's own, whatever the mesh around: of explicit axes
            # JAX would shard the sum, inside of which XLA takes no shardings.
            manual = {name: AxisType.Manual for name in mesh.axis_names}
            within = mesh.abstract_mesh.update_axis_types(manual)
            with jax.sharding.use_abstract_mesh(within):
                return tuple(
                    lax.psum(result, axes) if row is None else result
                    for result, row in zip(results, outs_rows, strict=True)
                )

        return mesh, local, places(outs, outs_rows), places(arrays, arrays_rows)

    return run


# A call whose inside is not looked into, such as for references that it makes and
# writes to: the partitioner takes no function that does.
closed_p = Primitive("flax_lstm_kernel")
closed_p.multiple_results = True
closed_p.def_abstract_eval(
    lambda *avals, call: [
        ShapedArray(out.shape, out.dtype)
        for out in jax.eval_shape(
            call, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        )
    ]
)
mlir.register_lowering(
    closed_p,
    mlir.lower_fun(lambda *arrays, call: call(*arrays), multiple_results=True),
)


def undivided_refusal(devices: int, *, exported: bool) -> str:
    """Returns why no kernel can run in a program that XLA is to divide."""
    where = "module exported for" if exported else "program on"
    return (
        f'implementation="pallas" cannot run in a {where} {devices} devices that XLA '
        "divides: it cannot be told what a kernel does on each. Call lstm inside "
        'jax.shard_map, or use "xla", "scan" or None.'
    )


def register(primitive: Any, statement: Callable, sizes_of: Callable) -> None:
    """Gives a primitive its lowering rules.

    Args:
      primitive: With the parameters of the statement, and `target`.
      statement: A function of `statement`, with a kernel of the same name.
      sizes_of: Returns T, B, I, H and the computation dtype, given the arguments.
    """

    def lower(platform: str | None, context: Any, *args, target, **options):
        made_for = context.module_context
        exported = made_for.lowering_parameters.for_export
        *sizes, dtype = sizes_of(*context.avals_in)
        kernels = kernels_for(platform, target, sizes, dtype, exported=exported)
        devices = getattr(made_for.axis_context, "num_devices", None) or 1
        # The compiler of the TPU calls nothing back to be told what to do on each of
        # them, nor does a module that was exported.
        undivided = devices > 1 and (platform == "tpu" or exported)
        if kernels is not None and undivided and target.asked:
            raise NotImplementedError(undivided_refusal(devices, exported=exported))
        if kernels is None or undivided:
            runs = mlir.lower_fun(partial(statement, **options), multiple_results=True)
            return runs(context, *args)
        shared = over_devices if devices > 1 else alone
        shared = one_by_one if target.interpret else shared
        kernel = partial(getattr(kernels, statement.__name__), shared=shared, **options)
        # Inside, nothing is known of the mesh axes over which arrays vary.
        bare = context.replace(
            avals_in=[ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in],
            avals_out=[
                ShapedArray(aval.shape, aval.dtype) for aval in context.avals_out
            ],
        )
        with _check_vma(False):
            if target.interpret:
                # The order of its callbacks begins here: see `one_by_one`.
                effects = jax.make_jaxpr(kernel)(*bare.avals_in).effects
                bare = bare.replace(tokens_in=mlir.TokenSet.create(list(effects)))
            return mlir.lower_fun(kernel, multiple_results=True)(bare, *args)

    prim_requires_devices_during_lowering.add(primitive)
    mlir.register_lowering(primitive, partial(lower, None))
    for platform in PLATFORMS:
        mlir.register_lowering(primitive, partial(lower, platform), platform=platform)


def alone(call: Callable, arrays_rows: Any, outs_rows: Any) -> Callable:
    """Takes the place of `over_devices` where there is one device."""
    return call


def one_by_one(call: Callable, arrays_rows: Any, outs_rows: Any) -> Callable:
    """Has an interpreted kernel begin when its arguments are there, and end at its end.

    The interpreter keeps what it allocates in one place for all kernels, by callbacks
    that by themselves wait neither for arguments nor for the kernel before.
    """

    def run(*arrays: Any) -> Any:
        io_callback(lambda *_: None, None, *arrays, ordered=True)
        outs = call(*arrays)
        return io_callback(lambda *outs: outs, outs, *outs, ordered=True)

    return run
