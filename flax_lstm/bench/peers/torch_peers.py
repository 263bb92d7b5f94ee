"""`torch.nn.LSTM`: oneDNN's on a CPU, cuDNN's on CUDA; packed and padded.

torch runs with as many threads as XLA, on the device that JAX runs on.
"""

# Imports what need not be installed.
# pyright: reportMissingImports=false

import importlib.util
from functools import partial
from typing import Any

import jax
import numpy as np

from flax_lstm import convert
from flax_lstm.bench.machine import threads
from flax_lstm.bench.peers.base import INSTALL, Implementation, Prepared, heeded
from flax_lstm.bench.problem import Numbers, Problem


def implementations() -> list[Implementation]:
    """Returns the layer on padded and on packed batches, and the cell for steps."""
    return [
        Implementation(name, "torch", about, missing, ready, ("torch",))
        for name, about, ready in (
            (
                "torch",
                "torch.nn.LSTM, every step of a padded batch",
                partial(prepare, False),
            ),
            (
                "torch-packed",
                "torch.nn.LSTM; packing and padding are part of the call",
                partial(prepare, True),
            ),
            ("torch-cell", "torch.nn.LSTMCell, one step", prepare_cell),
        )
    ]


def missing() -> str | None:
    """Says what keeps torch from running on the device of JAX."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed: {INSTALL}"
    import torch

    backend = jax.default_backend()
    if backend == "cpu":
        return None
    if backend not in ("gpu", "cuda"):
        return f'JAX runs on "{backend}", which torch does not know'
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, where JAX runs: install torch for CUDA"
    return None


def device() -> Any:
    """Returns torch's name of the device that JAX runs on."""
    import torch

    if jax.default_backend() == "cpu":
        torch.set_num_threads(threads())
        return torch.device("cpu")
    return torch.device("cuda")


def wait(on: Any) -> None:
    """Returns when the device is done."""
    if on.type == "cuda":
        import torch

        torch.cuda.synchronize(on)


def filled(module: Any, problem: Problem, on: Any) -> Any:
    """Returns a module of torch with our weights, in the dtype of the problem."""
    import torch

    values = convert.to_torch([(problem.params,)])
    if isinstance(module, torch.nn.LSTMCell):
        values = {key.removesuffix("_l0"): value for key, value in values.items()}
    module.load_state_dict({k: torch.tensor(v) for k, v in values.items()})
    return module.to(on, getattr(torch, problem.dtype))


def prepare(packed: bool, problem: Problem) -> Prepared:
    """Sets up `torch.nn.LSTM`; inference mode forward, autograd for the gradient."""
    import torch
    from torch.nn.utils import rnn

    if packed and problem.lengths is None:
        raise NotImplementedError("all rows are of one length: nothing to pack")
    on = device()
    module = torch.nn.LSTM(problem.shape.inputs, problem.shape.hidden)
    module = filled(module, problem, on).train(problem.mode == "gradient")
    x, h, c, y_bar = tensors(problem, on)
    lengths = torch.tensor([] if problem.lengths is None else problem.lengths).long()

    def run() -> Any:
        if not packed:
            return module(x, (h[None], c[None]))[0]
        rows = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        rows, _ = module(rows, (h[None], c[None]))
        return rnn.pad_packed_sequence(rows, total_length=len(x))[0]

    leaves = dict(module.named_parameters())

    def call() -> Any:
        if problem.mode == "gradient":
            y = run()
            arrays = (x, h, c, *leaves.values())
            result = (y, *torch.autograd.grad(y, arrays, grad_outputs=y_bar))
        else:
            with torch.inference_mode():
                result = (run(),)
        wait(on)
        return result

    def numbers(result: Any) -> Numbers:
        y, *bars = (v.detach().float().cpu().numpy() for v in result)
        if not bars:
            return Numbers(y)
        x_bar, h_bar, c_bar, *weights = bars
        named = dict(zip(leaves, weights, strict=True))
        # The gradient of the sum of two biases reaches both of them.
        named["bias_hh_l0"] = np.zeros_like(named["bias_hh_l0"])
        ((params,),) = convert.from_torch(named)
        return Numbers(y, params, x_bar, h_bar, c_bar)

    return Prepared(
        call,
        numbers,
        None,
        heeded(problem.lengths, packed, "padded"),
        heeded(problem.resets, False, "ignored"),
        note=products(on.type, problem.dtype, torch.backends.cudnn.allow_tf32),
    )


def products(device_type: str, dtype: str, allow_tf32: bool) -> str:
    """Says of what float32 products are made on a GPU; nothing elsewhere.

    cuDNN rounds their operands to tf32 unless told otherwise, as JAX does.
    """
    if device_type != "cuda" or dtype != "float32":
        return ""
    return "products of tf32" if allow_tf32 else "products of whole float32"


def prepare_cell(problem: Problem) -> Prepared:
    """Sets up one call of `torch.nn.LSTMCell`."""
    import torch

    if problem.mode != "step":
        raise NotImplementedError("the cell is one step; see the others")
    on = device()
    module = torch.nn.LSTMCell(problem.shape.inputs, problem.shape.hidden)
    module = filled(module, problem, on).eval()
    x, h, c, _ = tensors(problem, on)

    def call() -> Any:
        with torch.inference_mode():
            state = module(x[0], (h, c))
        wait(on)
        return state

    def numbers(result: Any) -> Numbers:
        return Numbers(result[0][None].float().cpu().numpy())

    return Prepared(call, numbers, None, "-", "-")


def tensors(problem: Problem, on: Any) -> list[Any]:
    """Returns x, h, c and the cotangent of y; the first three want gradients."""
    import torch

    wanted = problem.mode == "gradient"
    kind = getattr(torch, problem.dtype)
    arrays = (problem.x, problem.h, problem.c)
    return [
        *(torch.tensor(v, dtype=kind, device=on, requires_grad=wanted) for v in arrays),
        torch.tensor(problem.y_bar, dtype=kind, device=on),
    ]
