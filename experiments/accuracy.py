"""Collects what finished runs reached, one row for each.

    python experiments/accuracy.py RUN [RUN ...]

Writes `results/accuracy.csv`.
"""

import argparse
import json
import statistics
from pathlib import Path

from measured import write_rows

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"


def row_of(folder: Path) -> dict:
    config, summary, environment = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "summary", "environment")
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    result = summary["result"]
    if result is None:
        raise SystemExit(f"{folder} is not finished: it has no test result yet")
    data, model, training = config["data"], config["model"], config["training"]
    seconds = [epoch["seconds"] for epoch in epochs]
    return {
        "data": Path(data["data"]).name,
        "test_data": Path(data["test_data"] or "").name,
        "pipeline": data["pipeline"],
        "max_length": data["max_length"],
        "batch_size": data["batch_size"],
        "embedding_size": model["embedding_size"],
        "features": " ".join(map(str, model["features"])),
        "optimizer": training["optimizer"],
        "seed": training["seed"],
        "epochs_done": result["epochs_done"],
        "tested_epoch": result["tested_epoch"],
        "median_epoch_s": f"{statistics.median(seconds):.1f}",
        "fastest_epoch_s": f"{min(seconds):.1f}",
        "total_s": f"{result['seconds']:.0f}",
        "test_rows": int(result["test"]["count"]),
        "test_accuracy": f"{result['test']['accuracy']:.3f}",
        "device": environment["devices"][0],
        "processors": environment["processors"],
        "jax": environment["packages"]["jax"],
        "commit": environment["commit"],
        "date": environment["started"][:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run"
    )
    write_rows(RESULTS, [row_of(folder) for folder in parser.parse_args().runs])


if __name__ == "__main__":
    main()
