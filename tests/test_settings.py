"""What a run may ask for: ranges, and the settings of the run that goes on."""

import shutil

import numpy as np
import pytest
from small_runs import TUTORIAL, make_config

from flax_lstm import run, settings
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
        ({"clip_norm": 0.0}, "clip_norm must be a number above 0, or None .* got 0.0"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
        ({"forget_bias": float("nan")}, "model.forget_bias must be finite; got nan"),
        ({"seed": -1}, "training.seed must be .* at most 4294967295; got -1"),
        ({"seed": 2**32}, "training.seed must be .* at most 4294967295"),
    ],
)
def test_settings_out_of_range_are_refused(source, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run.train(make_config(source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": "64"}, "data.batch_size must be int; got '64'"),
        ({"epochs": 2.5}, "training.epochs must be int; got 2.5"),
        ({"patience": 2.5}, "training.patience must be int or null; got 2.5"),
        ({"optimizer": "sgd"}, "training.optimizer must be one of 'adamw', 'adadelta'"),
        ({"schedule": "foo"}, "training.schedule must be one of 'constant', 'cosine'"),
        ({"pooling": "foo"}, "model.pooling must be one of 'last'"),
        ({"features": 4}, "model.features must be a list of int; got 4"),
        ({"features": [4.0]}, r"model.features must be a list of int; got \[4.0\]"),
    ],
)
def test_settings_of_another_type_are_refused_before_anything_is_read(
    as_installed, tmp_path, changes, words
):
    """Given in Python, where a dataclass takes anything; the data does not exist."""
    config = make_config(tmp_path / "missing.csv", **changes)
    with pytest.raises(UserError, match=f"setting {words}"):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_list_of_features_is_what_a_tuple_is(as_installed, trained, source, tmp_path):
    """Down to the configuration that the run goes on with, which must be the same."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    config = make_config(source, features=[5], learning_rate=np.float64(0.1))
    result = run.train(config, folder, resume=True)
    assert result.config == make_config(source)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"features": (10**9,)}, r"model.features \(1000000000,\)"),
        ({"embedding_size": 10**12}, "model.embedding_size 1000000000000"),
        ({"batch_size": 10**11}, "data.batch_size 100000000000"),
        ({**TUTORIAL, "max_length": 10**9}, "data.max_length 1000000000"),
    ],
    ids=["features", "embedding_size", "batch_size", "max_length"],
)
def test_what_no_memory_holds_is_refused_before_it_is_tried(
    source, tmp_path, changes, name
):
    with pytest.raises(UserError, match=rf"needs [\d,]+ GiB .*{name}.* machine has"):
        run.train(make_config(source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["nnx", "linen"])
@pytest.mark.parametrize("implementation", ["pallas", "cudnn"])
def test_a_kernel_that_this_machine_lacks_is_refused_before_anything_is_written(
    source, tmp_path, library, implementation
):
    config = make_config(source, library=library, implementation=implementation)
    words = f'setting model.implementation="{implementation}" cannot run: .*cpu.*"xla"'
    with pytest.raises(UserError, match=words):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_kernel_is_judged_by_what_one_device_computes(source):
    """Sixteen rows in two parts on three devices, filled up, of seven words each."""
    seen = []
    config = make_config(source, implementation="cpu", gradient_accumulation=2)
    settings.check_implementation(
        config, lambda *shapes: seen.extend(one.shape for one in shapes[1:]), {}, 7, 3
    )
    assert seen == [(3, 7), (3,)]


def test_the_least_memory_is_below_what_a_state_and_a_step_hold(source):
    """Counted by hand: 4 floats a weight, and a batch of 16 texts of one word."""
    config = make_config(source, embedding_size=3, features=(5, 2))
    weights = 3 + 4 * 5 * (3 + 5 + 1) + 4 * 2 * (5 + 2 + 1)
    assert settings.least_bytes(config) == 4 * (4 * weights + 16 * (3 + 6 * (5 + 2)))
    padded = make_config(source, embedding_size=3, features=(5, 2), pipeline="tutorial")
    assert settings.least_bytes(padded) == 4 * (
        4 * weights + 8 * 16 * (3 + 6 * (5 + 2))  # every text is padded to 8 words
    )


def test_a_machine_that_does_not_tell_its_memory_refuses_nothing(source, monkeypatch):
    monkeypatch.setattr(settings, "machine_bytes", lambda: None)
    settings.check_settings(make_config(source, features=(10**9,)))
