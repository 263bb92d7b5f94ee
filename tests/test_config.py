"""Configurations: files in, files out, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flax_lstm.config import (
    PRESETS,
    TUTORIAL,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    UserError,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    text = json.dumps(PRESETS[name].to_dict())
    assert Config.from_dict(json.loads(text)) == PRESETS[name]


def test_leaf_names_are_unique_so_that_each_can_be_a_flag():
    names = [
        field.name
        for section in (DataConfig, ModelConfig, TrainConfig)
        for field in dataclasses.fields(section)
    ]
    assert len(names) == len(set(names))


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.epochs = 3  # pyright: ignore  (that is the point)


def test_the_tutorial_preset_has_the_published_constants():
    """Those of "Introduction to LSTMs with TensorFlow"."""
    data, model, training = TUTORIAL.data, TUTORIAL.model, TUTORIAL.training
    assert (data.pipeline, data.max_length, data.batch_size) == ("tutorial", 244, 256)
    assert (model.embedding_size, model.embedding_scale) == (300, 1.0)
    assert (model.features, model.dropout, model.forget_bias) == ((128, 64), 0.5, 1.0)
    assert (model.pooling, model.initializer) == ("last", "glorot")
    assert (training.optimizer, training.learning_rate) == ("adadelta", 0.1)
    assert (training.rho, training.epsilon) == (0.95, 1e-8)
    assert (training.loss, training.epochs, training.carry_state) == ("mse", 50, True)
    assert training.sparse_embedding
    assert training.clip_norm is None
    assert training.patience is None


def test_a_toml_file_changes_only_what_it_names(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nfeatures = [8, 4]\n\n[training]\nepochs = 3\n")
    got = Config.load(path, TUTORIAL)
    want = dataclasses.replace(
        TUTORIAL,
        model=dataclasses.replace(TUTORIAL.model, features=(8, 4)),
        training=dataclasses.replace(TUTORIAL.training, epochs=3),
    )
    assert got == want


def test_a_json_file_loads_what_to_dict_wrote(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TUTORIAL.to_dict()))
    assert Config.load(path) == TUTORIAL


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"section 'modle' is unknown; sections are \['data', 'model'"),
        ({"model": 3}, "section 'model' must be a table of settings; got 3"),
        (
            {"model": {"feature": [3]}},
            r"setting model.feature is unknown; settings are \['dropout'",
        ),
    ],
    ids=["section", "table", "setting"],
)
def test_unknown_settings_are_named_with_those_that_exist(values, message):
    with pytest.raises(UserError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.json", None),
        ("bad.json", "{"),
        ("bad.toml", "a ="),
        ("x.json", "[1]"),
        ("twice.json", '{"training": {"epochs": 1, "epochs": 2}}'),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"cannot read configuration .*{name}: "):
        Config.load(path)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("training", "epochs", "three"),
        ("training", "learning_rate", "0.1"),
        ("training", "sparse_embedding", 3),
        ("model", "pooling", "median"),
        ("model", "features", [3.5]),
        ("model", "features", 128),
        ("data", "data", 7),
        ("data", "batch_size", 2.5),
        ("data", "batch_size", True),
        ("training", "clip_norm", "none"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(section, name, value):
    with pytest.raises(UserError, match=rf"{section}\.{name} must be .*; got "):
        Config.from_dict({section: {name: value}})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("training", "learning_rate", 1), ("training", "clip_norm", None)],
)
def test_a_whole_number_is_a_number_and_none_is_none(section, name, value):
    config = Config.from_dict({section: {name: value}})
    assert getattr(getattr(config, section), name) == value


def test_a_path_and_a_number_of_numpy_are_taken_from_python(as_installed):
    data = DataConfig(data=Path("a") / "b.csv")
    training = TrainConfig(learning_rate=np.float64(0.5))
    got = Config(data=data, training=training).checked().to_dict()
    assert (got["data"]["data"], got["training"]["learning_rate"]) == ("a/b.csv", 0.5)
    assert type(got["training"]["learning_rate"]) is float
