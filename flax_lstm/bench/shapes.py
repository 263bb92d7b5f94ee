"""What is timed: named shapes, with the lengths and resets of the work they stand for.

Lengths are drawn from quantiles of real text, so that a batch is like a random batch of
that text. The quantiles were made once, from the texts of each data set, by

    from flax_lstm.config import DataConfig
    from flax_lstm.vocabulary import fit
    _, _, ends = fit(texts, DataConfig(pipeline=PIPELINE, max_length=STEPS))
    tokens = np.minimum(np.diff(ends), STEPS)
    np.quantile(tokens[tokens > 0], SHARES, method="nearest")

with the pipeline "tutorial" for StockTwits (the 96,966 $SPY messages of 2017 that have
a token) and "words" for IMDB (the 25,000 training reviews of Maas et al. 2011).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

SHARES = (0.0, 0.01, *(n / 20 for n in range(1, 20)), 0.99, 1.0)
# fmt: off
LENGTHS = {
    "stocktwits": (1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20, 22,
                   24, 26, 28, 39),
    "imdb": (11, 49, 75, 105, 127, 138, 146, 155, 164, 175, 188, 201, 218, 238, 262,
             291, 327, 374, 400, 400, 400, 400, 400),
}
# fmt: on
SEQUENCE = ("forward", "gradient")
MODES = (*SEQUENCE, "step")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer and one batch.

    Attributes:
      name: Its name in results.
      batch: B, rows.
      steps: T, the time that rows are padded to.
      inputs: I, input size.
      hidden: H, units.
      about: What it stands for.
      lengths: The entry of `LENGTHS` that lengths are drawn from; None for all equal.
      reset: Probability of a reset at a step of a row.
      modes: Modes that it is timed in unless others are asked for.
    """

    name: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    about: str
    lengths: str | None = None
    reset: float = 0.0
    modes: tuple[str, ...] = SEQUENCE

    def draw_lengths(self, seed: int) -> Int32[np.ndarray, "B"] | None:
        """Returns the length of each row, 1 to T, or None where all are T."""
        if self.lengths is None:
            return None
        shares = np.random.default_rng([seed, 1]).random(self.batch)
        drawn = np.rint(np.interp(shares, SHARES, LENGTHS[self.lengths]))
        return np.clip(drawn, 1, self.steps).astype(np.int32)

    def draw_resets(self, seed: int) -> Bool[np.ndarray, "T B"] | None:
        """Returns where the state is set to zero, or None where it never is."""
        if not self.reset:
            return None
        rng = np.random.default_rng([seed, 2])
        return rng.random((self.steps, self.batch)) < self.reset

    def one_step(self) -> "Shape":
        """Returns the shape of a single step of the same layer and batch."""
        return dataclasses.replace(self, steps=1, lengths=None, reset=0.0)


def named(*shapes: Shape) -> dict[str, Shape]:
    """Returns the shapes by name."""
    return {shape.name: shape for shape in shapes}


SHAPES = named(
    Shape("tutorial-40-1", 256, 40, 300, 128, "StockTwits tutorial, layer 1, T 40"),
    Shape("tutorial-40-2", 256, 40, 128, 64, "StockTwits tutorial, layer 2, T 40"),
    Shape("tutorial-244-1", 256, 244, 300, 128, "the same, padded as published"),
    Shape("tutorial-244-2", 256, 244, 128, 64, "the same, padded as published"),
    Shape(
        "stocktwits", 256, 40, 300, 128, "tutorial layer 1, its lengths", "stocktwits"
    ),
    # The sizes of the IMDB layer are a choice: word vectors of 300, 128 units.
    Shape("imdb", 64, 400, 300, 128, "IMDB reviews of up to 400 words", "imdb"),
    Shape("rl-256", 256, 128, 256, 256, "episodes, resets at 1 in 50", reset=0.02),
    Shape("rl-512", 256, 128, 512, 512, "episodes, resets at 1 in 50", reset=0.02),
    Shape("lm-1024", 64, 70, 1024, 1024, "language model, truncated at 70"),
    Shape("wide-2048", 16, 256, 2048, 2048, "wide layer, few rows"),
    Shape("long-256", 16, 4096, 256, 256, "long sequences"),
    Shape("stream-256", 1, 128, 256, 256, "one row", modes=("forward",)),
    Shape("stream-1024", 1, 128, 1024, 1024, "one row", modes=("forward",)),
    Shape("step-256", 1, 1, 256, 256, "one step of one row", modes=("step",)),
    Shape("step-1024", 1, 1, 1024, 1024, "one step of one row", modes=("step",)),
)
SMOKE_SHAPES = named(
    Shape("smoke-lengths", 8, 12, 24, 16, "tiny, unequal lengths", "stocktwits"),
    Shape("smoke-resets", 8, 12, 16, 16, "tiny, resets", reset=0.1, modes=("forward",)),
    Shape("smoke-step", 1, 1, 16, 16, "tiny, one step", modes=("step",)),
)
