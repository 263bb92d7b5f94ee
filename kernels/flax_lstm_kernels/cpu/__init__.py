"""The LSTM over time on a CPU, in C++ (`lstm.cc`), called through XLA's FFI.

The source is compiled by the system's C++ compiler for the very processor it runs on,
at the first use, into the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`). The
compiler is `$CXX`, where that is set, else `g++` or `clang++`. Without one there is no
such kernel, and `reason` says so.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Dtype    float32.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

SOURCE = Path(__file__).with_name("lstm.cc")
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",  # multiply and add in one instruction
    "-fno-math-errno",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",  # the warnings are those of XLA's headers
)
TARGETS = {
    "flax_lstm_cpu_forward": "FlaxLstmForward",
    "flax_lstm_cpu_backward": "FlaxLstmBackward",
}


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler, None where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [named] if named else [["g++"], ["clang++"]]:
        if path := shutil.which(name):
            return [path, *options]
    return None


@functools.cache
def reason() -> str | None:
    """Returns why the kernel cannot run on this machine; None where it can.

    The first call compiles and loads it.
    """
    if os.name != "posix":
        return f"it is built on Linux and macOS only, and this is {platform.system()}"
    command = compiler()
    if command is None:
        if named := os.environ.get("CXX"):
            return f"CXX is {named!r}, and there is no such compiler; set or unset it"
        return "it needs a C++ compiler (g++ or clang++, or one named by CXX)"
    try:
        library = ctypes.CDLL(str(built(command)))
    except subprocess.CalledProcessError as error:
        return f"{command[0]} could not compile it: {error.stderr.strip()[-300:]}"
    except OSError as error:
        return f"it cannot be built or loaded: {error}"
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu"
        )
    return None


def built(compiler: list[str]) -> Path:
    """Compiles the source unless this was done before; returns the library.

    Its name is a digest of all that it depends on, this machine's processor included,
    so that a cache folder shared by several machines holds one for each.
    """
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    parts = [
        *(path.read_bytes() for path in sources),
        shlex.join(compiler).encode(),
        " ".join(FLAGS).encode(),
    ]
    parts += [version("jaxlib").encode(), processor().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(home) / "flax-lstm" / "cpu" / f"lstm-{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # Under a name of its own first: another process may be building the same.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part = Path(folder) / library.name
        subprocess.run(
            [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", SOURCE, "-o", part],
            check=True,
            capture_output=True,
            text=True,
        )
        part.replace(library)
    jax.monitoring.record_event_duration_secs(
        "/flax_lstm/compile_duration", time.perf_counter() - began
    )
    return library


def processor() -> str:
    """Returns what tells one kind of processor from another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Feat"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])


def forward(
    inputs: Float[Array, "T B I"],
    kernel: Float[Array, "I G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, " G"],
    c: Float[Array, "B H"],
    h: Float[Array, "B H"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    keep: bool,
) -> tuple[Array, ...]:
    """Runs the LSTM; `reason()` must have returned None.

    Args:
      inputs: What to run over; not read past the lengths.
      kernel: Weights of the inputs.
      recurrent_kernel: Weights of the outputs.
      bias: Bias.
      c: Cell before the first step.
      h: Output before the first step.
      lengths: int32, 0 to T.
      resets: Not 0 where a step starts from zeros; `[0, 0]` for nowhere.
      reverse: From the last valid step to the first.
      keep: Also returns what `backward` needs.

    Returns:
      `(hs [T, B, H], c, h, gates [T, B, 4H], before [T, B, H])`: the outputs, the final
      state, the gates after activation and the cell that each step started from. Past
      the lengths hs is 0 and the last two are anything, NaN even; they are empty
      without `keep`.
    """
    steps, rows, hidden = *inputs.shape[:2], h.shape[1]
    kept = (steps, rows) if keep else (0, 0)

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    state = out(rows, hidden)
    hs, c, h, before, gates = jax.ffi.ffi_call(
        "flax_lstm_cpu_forward",
        (
            out(steps, rows, hidden),
            state,
            state,
            out(*kept, hidden),
            out(*kept, 4 * hidden),
        ),
    )(
        inputs,
        kernel,
        recurrent_kernel,
        bias,
        c,
        h,
        lengths,
        resets,
        reverse=reverse,
    )
    return hs, c, h, gates, before


def backward(
    d_hs: Float[Array, "T B H"],
    d_c: Float[Array, "B H"],
    d_h: Float[Array, "B H"],
    inputs: Float[Array, "T B I"],
    kernel: Float[Array, "I G"],
    recurrent_kernel: Float[Array, "H G"],
    h: Float[Array, "B H"],
    hs: Float[Array, "T B H"],
    gates: Float[Array, "T B G"],
    before: Float[Array, "T B H"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    of_inputs: bool,
) -> tuple[Array, ...]:
    """Carries gradients back through time.

    Args:
      d_hs: Gradient of the outputs; not read past the lengths.
      d_c: Gradient of the final cell.
      d_h: Gradient of the final output.
      inputs: As in `forward`, as the next three.
      kernel: See `inputs`.
      recurrent_kernel: See `inputs`.
      h: See `inputs`.
      hs: As `forward` returned it, as the next two.
      gates: See `hs`.
      before: See `hs`.
      lengths: As in `forward`.
      resets: As in `forward`.
      reverse: As in `forward`.
      of_inputs: Whether the gradient of the inputs is wanted.

    Returns:
      `(d_inputs, d_kernel, d_recurrent_kernel, d_bias, d_c, d_h)`: gradients of
      what `forward` was given; d_inputs is 0 past the lengths, and `[0, 0, 0]` unless
      wanted.
    """
    outs = (
        inputs.shape if of_inputs else (0, 0, 0),
        kernel.shape,
        recurrent_kernel.shape,
        kernel.shape[1:],
        d_c.shape,
        d_h.shape,
    )
    return tuple(
        jax.ffi.ffi_call(
            "flax_lstm_cpu_backward",
            [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outs],
        )(
            d_hs,
            d_c,
            d_h,
            inputs,
            kernel,
            recurrent_kernel,
            h,
            hs,
            gates,
            before,
            lengths,
            resets,
            reverse=reverse,
        )
    )
