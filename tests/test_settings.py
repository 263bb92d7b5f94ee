"""What a run may ask for: ranges, and the settings of the run that goes on."""

import pytest
from small_runs import make_config

from flax_lstm import run
from flax_lstm.config import UserError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": (6,)}, r"model.features = \(5,\).*go on with \(6,\)"),
        ({"batch_size": 8}, r"data.batch_size = 16.*go on with 8"),
        ({"epochs": 3}, r"training.epochs = 4.*go on with 3; epochs can only grow"),
    ],
    ids=["model", "data", "fewer epochs"],
)
def test_resuming_with_other_settings_names_them(trained, source, changes, words):
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, **changes), trained[0].folder, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "training.epochs must be at least 1; got 0"),
        ({"features": ()}, "model.features must be at least 1; got 0"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and below 1; got 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be .* got nan"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
    ],
)
def test_settings_out_of_range_are_refused(source, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
