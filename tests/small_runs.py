"""Runs that are trained in a second: tiny texts, a tiny model."""

import csv
import dataclasses
import random
from pathlib import Path

import jax
import numpy as np

from flax_lstm.config import Config, DataConfig, ModelConfig, TrainConfig


def write_texts(path: Path) -> Path:
    """Writes eighty short texts, of which a word tells the label."""
    rng = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(80):
            words = rng.choices(["film", "plot", "cast", "song", "a", "the"], k=4)
            words.insert(n % 5, ["awful", "lovely"][n % 2])
            writer.writerow([" ".join(words), ["bad", "good"][n % 2]])
    return path


def make_config(source: Path, **changes) -> Config:
    """A tiny model on the tiny data; `changes` go to whichever section has them."""
    values = {
        "data": dict(data=str(source), batch_size=16, buckets=1, max_length=8),
        "model": dict(
            embedding_size=4, embedding_scale=0.5, features=(5,), dropout=0.1
        ),
        # A constant rate, so that runs of any length share a compiled program.
        "training": dict(
            epochs=4,
            learning_rate=0.1,
            schedule="constant",
            warmup_fraction=0.0,
            patience=None,
        ),
    }
    kinds = {"data": DataConfig, "model": ModelConfig, "training": TrainConfig}
    for name, value in changes.items():
        for section, kind in kinds.items():
            if name in {field.name for field in dataclasses.fields(kind)}:
                values[section][name] = value
    return Config(**{s: kind(**values[s]) for s, kind in kinds.items()})


TUTORIAL = dict(
    pipeline="tutorial",
    carry_state=True,
    pooling="last",
    optimizer="adadelta",
    schedule="cosine",  # not the tutorial's, but it must be resumed in its middle
    test_with="last",
)


def bits(params) -> list[bytes]:
    return [np.asarray(p).tobytes() for p in jax.tree.leaves(params)]


class Stop(Exception):
    """Stands for whatever ends a process."""
