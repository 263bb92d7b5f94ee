"""Trains by Ray Train's JaxTrainer, which starts the workers and `jax.distributed`.

    python experiments/launch/ray_train.py --workers 2 --gpu -- --out /shared/run ...

What follows `--` are arguments of `flax-lstm train`. The run folder and the data lie on
a file system that all workers share.
"""

import argparse
from collections.abc import Sequence
from typing import Any


def train_worker(config: dict[str, Any]) -> None:
    """Trains in one worker, where Ray has joined the processes already.

    Args:
      config: `argv`, the arguments of `flax-lstm train`.
    """
    # Not at the top: the driver must not take the accelerators from its workers.
    from flax_lstm import cli, run

    command = cli.parse(["train", *config["argv"]])
    assert isinstance(command, cli.Train)
    run.train(command.settings, command.out, resume="auto")


def main(argv: Sequence[str] | None = None) -> None:
    """Starts the workers and waits for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    kind.add_argument(
        "--tpu", metavar="TYPE,TOPOLOGY", help="a slice, such as TPU-V6E,4x4"
    )
    parser.add_argument("train", nargs="*", help="arguments of flax-lstm train")
    given = parser.parse_args(argv)

    from ray.train import ScalingConfig  # pyright: ignore[reportMissingImports]
    from ray.train.v2.jax import JaxTrainer  # pyright: ignore[reportMissingImports]

    scaling: dict[str, Any] = {"num_workers": given.workers, "use_gpu": given.gpu}
    if given.tpu:
        accelerator, topology = given.tpu.split(",")
        scaling |= {
            "use_tpu": True,
            "accelerator_type": accelerator,
            "topology": topology,
        }
    JaxTrainer(
        train_worker,
        train_loop_config={"argv": given.train},
        scaling_config=ScalingConfig(**scaling),
    ).fit()


if __name__ == "__main__":
    main()
