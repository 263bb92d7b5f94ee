"""Against `torch.nn.LSTM` and its autograd."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_common import (
    FLOAT64,
    Case,
    Problem,
    Result,
    assert_close,
    draw_problem,
    draw_stack,
    float32,
    ours,
    run_stack,
)

from flax_lstm import LSTMState, convert, lstm, lstm_cell

torch = pytest.importorskip("torch", reason="compares with torch.nn.LSTM")

pytestmark = pytest.mark.parity

SEEDS = range(16)


def build(case: Case, stack: convert.Stack, dtype: Any, **options: Any) -> Any:
    """Returns the torch module that holds our weights."""
    module = torch.nn.LSTM(
        case.input_size,
        case.hidden,
        case.layers,
        bidirectional=case.directions == 2,
        dtype=dtype,
        **options,
    )
    values = convert.to_torch(stack, bias=options.get("bias", True))
    module.load_state_dict({key: torch.tensor(v) for key, v in values.items()})
    return module


def theirs(module: Any, problem: Problem) -> Result:
    """Returns torch's outputs, states and gradients, the latter in our form."""
    x, h, c = (torch.tensor(v, requires_grad=True) for v in problem[:3])
    if problem.lengths is None:
        y, (h_n, c_n) = module(x, (h, c))
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(problem.lengths), enforce_sorted=False
        )
        packed, (h_n, c_n) = module(packed, (h, c))
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=len(x))
    bars = [torch.tensor(v) for v in (problem.y_bar, problem.h_bar, problem.c_bar)]
    leaves = dict(module.named_parameters())
    grads = torch.autograd.grad(
        (y, h_n, c_n), [x, h, c, *leaves.values()], grad_outputs=bars
    )
    weights = dict(zip(leaves, grads[3:], strict=True))
    for key in weights:
        if key.startswith("bias_hh"):  # the gradient of the sum reaches both
            torch.testing.assert_close(weights[key], weights[f"bias_ih{key[7:]}"])
            weights[key] = torch.zeros_like(weights[key])
    return Result(
        *(v.detach().numpy() for v in (y, h_n, c_n, *grads[:3])),
        stack_bar=convert.from_torch(weights),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_states_and_gradients_equal_torch_in_float64(seed):
    case = Case.draw(seed)
    stack = draw_stack(case, seed, np.float64)
    problem = draw_problem(case, seed, np.float64)
    want = theirs(build(case, stack, torch.float64), problem)
    assert_close(ours(stack, problem), want, FLOAT64)


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_outputs_states_and_gradients_equal_torch_in_float32(seed):
    case = Case.draw(seed)
    stack = draw_stack(case, seed, np.float32)
    problem = draw_problem(case, seed, np.float32)
    want = theirs(build(case, stack, torch.float32), problem)
    assert_close(ours(stack, problem), want, float32(case.layers * case.steps))


@pytest.mark.usefixtures("x64")
def test_weights_of_a_torch_module_read_back_and_forth():
    module = torch.nn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    stack = convert.from_torch(module.state_dict())
    problem = draw_problem(Case(7, 4, 3, 5, 2, 2, True), 0, np.float64)
    assert_close(ours(stack, problem), theirs(module, problem), FLOAT64)
    other = torch.nn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    values = {k: torch.tensor(v) for k, v in convert.to_torch(stack).items()}
    other.load_state_dict(values)
    assert_close(theirs(other, problem), theirs(module, problem), FLOAT64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(4))
def test_projections_equal_torch(seed):
    """`proj_size`: outputs, states and gradients, and the way there and back."""
    case = Case.draw(seed, hidden=5, lengths=True)
    module = torch.nn.LSTM(
        case.input_size,
        5,
        case.layers,
        bidirectional=case.directions == 2,
        proj_size=3,
        dtype=torch.float64,
    )
    stack = convert.from_torch(module.state_dict())
    problem = draw_problem(case, seed, np.float64, width=3)
    assert_close(ours(stack, problem), theirs(module, problem), FLOAT64)
    values = {k: torch.tensor(v) for k, v in convert.to_torch(stack).items()}
    module.load_state_dict(values)
    assert_close(ours(stack, problem), theirs(module, problem), FLOAT64)


@pytest.mark.usefixtures("x64")
def test_packed_lengths_of_torchs_variable_sequence_test():
    """Two bidirectional layers over lengths 10 10 6 2 2 1 1."""
    case = Case(10, 7, 3, 4, 2, 2, True)
    stack = draw_stack(case, 0, np.float64)
    problem = draw_problem(case, 0, np.float64)._replace(
        lengths=np.array([10, 10, 6, 2, 2, 1, 1], np.int32)
    )
    live = np.arange(10)[:, None] < problem.lengths[None]
    problem = problem._replace(y_bar=problem.y_bar * live[..., None])
    want = theirs(build(case, stack, torch.float64), problem)
    assert_close(ours(stack, problem), want, FLOAT64)
    np.testing.assert_array_equal(want.y[~live], 0)


@pytest.mark.usefixtures("x64")
def test_an_empty_batch_is_allowed_as_in_torch():
    case = Case(3, 0, 2, 4, 1, 1, False)
    stack = draw_stack(case, 0, np.float64)
    problem = draw_problem(case, 0, np.float64)
    want = theirs(build(case, stack, torch.float64), problem)
    assert_close(ours(stack, problem), want, FLOAT64)


def test_length_zero_and_no_steps_work_where_torch_refuses():
    """Ours on purpose: the initial state comes back, the outputs are 0 or none."""
    case = Case(3, 2, 2, 4, 1, 1, False)
    stack = draw_stack(case, 0, np.float32)
    problem = draw_problem(case, 0, np.float32)
    module = build(case, stack, torch.float32)
    with pytest.raises(RuntimeError, match="greater than 0"):
        torch.nn.utils.rnn.pack_padded_sequence(
            torch.tensor(problem.x), torch.tensor([0, 2]), enforce_sorted=False
        )
    with pytest.raises(RuntimeError, match="larger than 0"):
        module(torch.zeros(0, 2, 2))
    y, h, c = run_stack(stack, problem.x, problem.h, problem.c, np.array([0, 2]))
    np.testing.assert_array_equal(y[:, 0], 0)
    np.testing.assert_array_equal(h[0, 0], problem.h[0, 0])
    np.testing.assert_array_equal(c[0, 0], problem.c[0, 0])
    y, h, c = run_stack(stack, problem.x[:0], problem.h, problem.c)
    assert y.shape == (0, 2, 4)
    np.testing.assert_array_equal(h, problem.h)
    np.testing.assert_array_equal(c, problem.c)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_equal_torch():
    """Hessian of a scalar in the inputs, by forward over reverse."""
    case = Case(3, 2, 2, 2, 1, 1, False)
    stack = draw_stack(case, 1, np.float64)
    problem = draw_problem(case, 1, np.float64)
    module = build(case, stack, torch.float64)

    def by_torch(x: Any) -> Any:
        return (module(x)[0] * torch.tensor(problem.y_bar)).sum()

    want = torch.autograd.functional.hessian(by_torch, torch.tensor(problem.x))

    def by_us(x: Any) -> Any:
        return (run_stack(stack, x)[0] * jnp.asarray(problem.y_bar)).sum()

    got = jax.hessian(by_us)(jnp.asarray(problem.x))
    assert_close(got, want.numpy(), FLOAT64)


class TestTorchsOwnSamples:
    """The inputs with which torch tests its own modules."""

    @pytest.fixture
    def samples(self):
        pytest.importorskip("expecttest", reason="torch's own samples import it")
        from torch.testing._internal import common_modules

        def inputs(module: Any, kind: str = "module_inputs_func") -> list:
            info = {m.module_cls: m for m in common_modules.module_db}[module]
            return list(
                getattr(info, kind)(
                    info,
                    device="cpu",
                    dtype=torch.float64,
                    requires_grad=False,
                    training=False,
                )
            )

        return inputs

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("projection", [False, True])
    def test_lstm(self, samples, projection):
        """Unbatched, so a batch axis of one is added."""
        chosen = [
            sample
            for sample in samples(torch.nn.LSTM)
            if bool(sample.constructor_input.kwargs["proj_size"]) == projection
        ]
        assert len(chosen) == 16
        for sample in chosen:
            module = torch.nn.LSTM(
                **sample.constructor_input.kwargs, dtype=torch.float64
            )
            inputs = sample.forward_input.args
            want, (want_h, want_c) = module(*inputs)
            stack = convert.from_torch(module.state_dict())
            x = inputs[0].numpy()[:, None]
            h = c = None
            if len(inputs) == 2:
                h, c = (v.numpy()[:, None] for v in inputs[1])
            y, h, c = run_stack(stack, x, h, c)
            got = (y[:, 0], h[:, 0], c[:, 0])
            want = tuple(v.detach().numpy() for v in (want, want_h, want_c))
            assert_close(got, want, FLOAT64)

    @pytest.mark.usefixtures("x64")
    def test_lstm_cell(self, samples):
        chosen = samples(torch.nn.LSTMCell)
        assert len(chosen) == 2
        for sample in chosen:
            options = sample.constructor_input
            module = torch.nn.LSTMCell(
                *options.args, **options.kwargs, dtype=torch.float64
            )
            x, (h, c) = sample.forward_input.args
            want = module(x, (h, c))
            values = {f"{k}_l0": v for k, v in module.state_dict().items()}
            ((params,),) = convert.from_torch(values)
            x, h, c = (jnp.asarray(v.numpy()) for v in (x, h, c))
            new, y = lstm_cell(params, LSTMState(c, h), x)
            want_h, want_c = (v.detach().numpy() for v in want)
            assert_close((new.h, new.c, y), (want_h, want_c, want_h), FLOAT64)

    @pytest.mark.usefixtures("as_installed")
    def test_error_inputs_raise(self, samples):
        """Wrong features, hidden size, batch size and rank of the state."""
        wrong = samples(torch.nn.LSTMCell, "module_error_inputs_func")
        assert len(wrong) == 4
        params = convert.from_torch(
            {
                f"{key}_l0": value
                for key, value in torch.nn.LSTMCell(10, 20).state_dict().items()
            }
        )[0][0]
        for sample in wrong:
            x, (h, c) = sample.module_error_input.forward_input.args
            x, h, c = (jnp.asarray(v.numpy(), jnp.float32) for v in (x, h, c))
            with pytest.raises(ValueError, match=r"(inputs|state\.c) must be \["):
                lstm(params, x[None], LSTMState(c, h))
