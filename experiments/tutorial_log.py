"""Holds runs of `--preset tutorial` against the tutorial's published log.

    python experiments/tutorial_log.py RUN [RUN ...]

Writes `results/tutorial_stocktwits.csv`: a row for each epoch of each run beside the
published one, and a row `test` for each finished run. Prints the widest gap of epochs
1 to 10, the bar of which is 0.02.
"""

import argparse
import csv
import json
from pathlib import Path

# Validation accuracy by epoch, and the test accuracy after 50 epochs, printed by the
# notebook of "Introduction to LSTMs with TensorFlow" (Hoffman, O'Reilly 2018).
PUBLISHED = dict(
    enumerate([0.578, 0.596, 0.617, 0.627, 0.632, 0.642, 0.648, 0.653, 0.656, 0.659], 1)
) | {20: 0.684, 30: 0.701}
PUBLISHED_TRAIN = dict(
    enumerate([0.562, 0.583, 0.597, 0.610, 0.620, 0.632, 0.636, 0.641, 0.646, 0.652], 1)
)
PUBLISHED_TEST = 0.717

RESULTS = Path(__file__).parent / "results" / "tutorial_stocktwits.csv"
COLUMNS = [
    "seed",
    "epoch",
    "train_loss",
    "train_accuracy",
    "train_accuracy_published",
    "validation_accuracy",
    "validation_accuracy_published",
    "test_accuracy",
    "test_accuracy_published",
    "max_length",
    "sparse_embedding",
    "seconds",
    "device",
    "jax",
    "commit",
    "date",
]


def rows_of(folder: Path) -> list[dict]:
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    common = {
        "seed": config["training"]["seed"],
        "max_length": config["data"]["max_length"],
        "sparse_embedding": config["training"]["sparse_embedding"],
        "device": environment["devices"][0],
        "jax": environment["packages"]["jax"],
        "commit": environment["commit"],
        "date": environment["started"][:10],
    }
    rows, number = [], 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        number = epoch["epoch"]
        rows.append(
            common
            | {
                "epoch": number,
                "train_loss": f"{epoch['train_loss']:.3f}",
                "train_accuracy": f"{epoch['train_accuracy']:.3f}",
                "train_accuracy_published": PUBLISHED_TRAIN.get(number, ""),
                "validation_accuracy": f"{epoch['validation_accuracy']:.3f}",
                "validation_accuracy_published": PUBLISHED.get(number, ""),
                "seconds": f"{epoch['seconds']:.1f}",
            }
        )
    if summary["result"]:
        rows.append(
            common
            | {
                "epoch": "test",
                "test_accuracy": f"{summary['result']['test']['accuracy']:.3f}",
                # Published after 50 epochs; a shorter run has nothing to be held to.
                "test_accuracy_published": PUBLISHED_TEST if number == 50 else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run"
    )
    rows = []
    for folder in parser.parse_args().runs:
        new = rows_of(folder)
        gaps = [
            float(row["validation_accuracy"]) - PUBLISHED[row["epoch"]]
            for row in new
            if row["epoch"] in range(1, 11)
        ]
        print(f"seed {new[0]['seed']}: widest gap {max(gaps, key=abs):+.3f}")
        rows += new
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
