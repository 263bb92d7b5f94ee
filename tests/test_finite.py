"""Numbers that are not finite are found by name, and told with a way out."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm.finite import NonFiniteLossError, check_finite, nonfinite_leaves

METRICS = {"learning_rate": 0.5, "loss": np.nan, "grad_norm": np.inf, "finite": False}


def test_what_a_step_met_is_told():
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(METRICS, 7, None, "rows 3 and 4")
    said = str(caught.value)
    assert "step 7, with learning rate 0.5, gave loss nan" in said
    assert "gradient norm inf on rows 3 and 4" in said
    assert "no checkpoint has been saved yet" in said
    with pytest.raises(NonFiniteLossError, match=r"checkpoint is that of step 5\."):
        check_finite(METRICS, 7, 5)
    assert check_finite(METRICS | {"finite": True}, 7, None) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_arrays_with_numbers_that_are_not_finite_are_named(bad):
    tree = {"fine": jnp.ones(2), "of": [jnp.array([1, bad]), jnp.arange(3)]}
    assert nonfinite_leaves(tree) == ["of.0"]
    assert nonfinite_leaves({"fine": jnp.full(2, jnp.finfo("float32").max)}) == []
