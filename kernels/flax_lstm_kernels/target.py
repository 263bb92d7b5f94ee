"""The device that kernels are chosen and planned for: the default one, or one named.

`with on("tpu", "TPU v5e"):` is for a machine that is not here: what would run there is
explained, or exported. `with on("cuda", "9.0", interpret=True):` runs the kernels of
another machine on this one, instruction by instruction, which is for tests.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """A device.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu"; as JAX's lowering rules are named.
      kind: `device_kind` of a TPU, compute capability of a GPU; None for any.
      interpret: Runs the kernels of the platform by Pallas' interpreter, on any device.
      named: By `on`; what is exported may then count on it.
      asked: The kernel was asked for by name: where it could run but for how the
        program is divided, that is an error.
    """

    platform: str
    kind: str | None = None
    interpret: bool = False
    named: bool = False
    asked: bool = False


# Not a global: jax.jit keeps what was traced for each value of it apart. To make it
# throws away all that is compiled, so this is imported with the package, not at a call.
_named: Any = jax.make_user_context(None)


def on(
    platform: str, kind: str | None = None, *, interpret: bool = False
) -> AbstractContextManager[Any]:
    """Names the device to choose and plan for, within a `with`; see `Target`."""
    return _named(Target(platform, kind, interpret, named=True))


def current() -> Target:
    """Returns the device named by `on`, else the default one of JAX."""
    if _named.value is not None:
        return _named.value
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Target(device.platform, device.device_kind)
    # "9.0" of NVIDIA's, "gfx942" of AMD's.
    capability = str(device.compute_capability)
    return Target("rocm" if capability.startswith("gfx") else "cuda", capability)
