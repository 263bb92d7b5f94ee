"""Does a run bear being killed for hours, and does it leak?

    python experiments/soak.py --minutes 20
    python experiments/soak.py --epochs 30 --faults 6 --dry

One run is trained without a fault: it saves, validates and prunes thousands of times
in one process, whose memory and open files are watched. Then the same run is trained
while it is killed, asked to stop, and its newest checkpoint damaged, at random moments;
each time the same command goes on, and the folder is evaluated in between. That is
repeated, with other moments, until the minutes are over. All must end with the same
bits.

Passes when faults came and the digests are equal, no child failed or kept silent about
damage, the memory after the warm-up (the first third) stays within 5 %, at most two
more files stay open in the second half of the rest than in the first (all but a tenth
of the time: a checkpoint under way has some more, the end of a process fewer), and the
folder with faults is never twice as large as the one without (it may hold two damaged
checkpoints beside the three that are kept). Writes a row to results/soak.csv unless
`--dry`.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from flax_lstm import environment

RESULTS = Path(__file__).parent / "results" / "soak.csv"
TRAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flax_lstm.cli import main
sys.exit(main())
"""
EVALUATE = """
import sys, warnings
from flax_lstm.checkpoint import CheckpointWarning
from flax_lstm.run import Run
warnings.simplefilter("ignore", CheckpointWarning)
print(Run.load(sys.argv[1]).evaluate("validation")["loss"])
"""
SAVE_EVERY = 7
WARM_UP, MEMORY_BAND = 1 / 3, 0.05
SAMPLE_S = 0.2
CALIBRATION_EPOCHS = 40


def write_texts(path: Path) -> None:
    """Writes short texts of which a word tells the label."""
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(160):
            words = draw.choices(["film", "plot", "cast", "song", "a", "the"], k=4)
            words.insert(n % 5, ["awful", "lovely"][n % 2])
            writer.writerow([" ".join(words), ["bad", "good"][n % 2]])


def train_command(texts: Path, folder: Path, epochs: int) -> list[str]:
    """Returns the command that starts the run or goes on with it."""
    options = {
        "data": texts,
        "out": folder,
        "epochs": epochs,
        "save-every": SAVE_EVERY,
        "features": 8,
        "embedding-size": 8,
        "buckets": 1,
        "batch-size": 8,
        "patience": None,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-c", TRAIN, "train", "--auto-resume", *map(str, flags)]


def resident_mib(pid: int) -> float | None:
    """Returns the resident memory of a process; None when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def open_files(pid: int) -> int | None:
    """Returns how many files a process has open; None when it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def staying(counts: list[float]) -> float:
    """Returns the count that a tenth of all are below."""
    return sorted(counts)[len(counts) // 10] if counts else 0


def size_mib(folder: Path) -> float:
    """Returns the size of the files in a folder that another process changes."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over what is gone already
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total / 2**20


def epochs_done(folder: Path) -> int:
    """Returns the epochs that the run has told of."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def digest(folder: Path) -> str:
    """Returns one digest of the last state, all epochs and the test of a run."""
    steps = [
        int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()
    ]
    record = folder / "checkpoints" / str(max(steps)) / "meta" / "metadata"
    timed = {"seconds", "tokens_per_second", "validation_seconds", "wait_share"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    epochs = [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for line in lines
    ]
    test = json.loads((folder / "summary.json").read_text())["result"]["test"]
    leaves = json.loads(record.read_text())["leaves"]
    whole = json.dumps([leaves, epochs, test], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def straight(command: list[str], folder: Path) -> dict[str, list[float]]:
    """Trains without a fault; returns what was seen of the process over time.

    That is memory and folder size in MiB, open files, epochs done, and the clock.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        seen: dict[str, list[float]] = {
            name: [] for name in ("memory", "files", "folder", "epochs", "seconds")
        }
        while child.poll() is None:
            memory, files = resident_mib(child.pid), open_files(child.pid)
            if epochs_done(folder) and memory is not None and files is not None:
                seen["memory"].append(memory)
                seen["files"].append(files)
                seen["folder"].append(size_mib(folder))
                seen["epochs"].append(epochs_done(folder))
                seen["seconds"].append(time.time())
            time.sleep(SAMPLE_S)
        if child.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode()[-2000:])
    return seen


def damage(folder: Path, draw: random.Random) -> str:
    """Does something to a file of the newest checkpoint; returns what."""
    steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    files = [p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    if len(steps) < 2:
        return "none"  # there would be nothing to fall back to
    path, how = draw.choice(files), draw.choice(["flip", "truncate", "empty", "delete"])
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2 if how == "truncate" else 0])
    return how


def faulty(
    command: list[str],
    folder: Path,
    life_s: float,
    until: float | None,
    faults: int | None,
    draw: random.Random,
) -> tuple[Counter[str], float]:
    """Trains with faults; returns their number by kind, and the largest folder size.

    Args:
      command: Starts or goes on.
      folder: Of the run.
      life_s: Mean time to a fault after the first epoch line of a child.
      until: Time after which there are no more faults; None for none.
      faults: Number of faults after which there are no more; None for none.
      draw: Decides what happens when.
    """
    counts: Counter[str] = Counter()
    largest = 0.0
    while True:
        enough = counts.total() >= faults if faults is not None else False
        last = enough or (until is not None and time.time() >= until)
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        kind = "none"
        if not last:
            assert child.stdout is not None
            for line in child.stdout:  # it trains, so that something is at stake
                if line.startswith("Epoch: "):
                    break
            time.sleep(draw.uniform(0, 2 * life_s))
            kind = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "damage"])
            name = "SIGKILL" if kind == "damage" else kind
            child.send_signal(getattr(signal, name))
        out, _ = child.communicate()
        if child.returncode == 0:
            return counts, largest  # done, maybe before its fault came
        if last or child.returncode not in (-9, 143, 130):
            raise SystemExit(f"ended with {child.returncode} after {kind}:\n{out}")
        if kind == "damage":
            kind = f"damage: {damage(folder, draw)}"
        counts[kind] += 1
        largest = max(largest, size_mib(folder))
        looked = subprocess.run(
            [sys.executable, "-c", EVALUATE, str(folder)],
            capture_output=True,
            text=True,
        )
        if looked.returncode:
            raise SystemExit(f"evaluation failed after {kind}:\n{looked.stderr}")


def soak(minutes: float | None, epochs: int, faults: int | None, work: Path) -> dict:
    """Runs both; returns the row."""
    texts = work / "texts.csv"
    write_texts(texts)
    began = time.time()
    if minutes is not None:  # as many epochs as fill a fifth of the time
        folder = work / "calibration"
        seen = straight(train_command(texts, folder, CALIBRATION_EPOCHS), folder)
        done, clock = seen["epochs"], seen["seconds"]
        each = (clock[-1] - clock[0]) / max(done[-1] - done[0], 1)
        epochs = max(CALIBRATION_EPOCHS, round(minutes * 60 / 5 / each))
    seen = straight(train_command(texts, work / "straight", epochs), work / "straight")
    life_s = max((time.time() - began) / 40, 0.3)
    until = None if minutes is None else began + 60 * minutes
    draw = random.Random(1)
    counts: Counter[str] = Counter()
    largest, digests = 0.0, []
    while not digests or (until is not None and time.time() < until):
        folder = work / f"faulty {len(digests)}"
        command = train_command(texts, folder, epochs)
        came, size = faulty(command, folder, life_s, until, faults, draw)
        counts += came
        largest = max(largest, size)
        digests.append(digest(folder))
    after = {k: v[int(len(v) * WARM_UP) :] for k, v in seen.items()}
    memory = after["memory"]
    middle = sorted(memory)[len(memory) // 2]
    half = len(memory) // 2
    return {
        "minutes": round((time.time() - began) / 60, 1),
        "epochs": epochs,
        "runs_with_faults": len(digests),
        "faults": counts.total(),
        "kinds": "; ".join(f"{kind} {n}" for kind, n in sorted(counts.items())),
        "memory_mib": f"{middle:.1f}",
        "memory_spread": f"{(max(memory) - min(memory)) / 2 / middle:.4f}",
        "files_first_half": staying(after["files"][:half]),
        "files_second_half": staying(after["files"][half:]),
        "folder_straight_mib": f"{max(seen['folder']):.3f}",
        "folder_faulty_mib": f"{largest:.3f}",
        "same_bits": set(digests) == {digest(work / "straight")},
    }


def verdict(row: dict[str, Any]) -> list[str]:
    """Returns what did not pass."""
    wrong = []
    if not row["faults"]:
        wrong.append("no fault came before the run was done")
    if not row["same_bits"]:
        wrong.append("the digests differ")
    if float(row["memory_spread"]) > MEMORY_BAND:
        wrong.append(f"memory varies by {row['memory_spread']} of {row['memory_mib']}")
    if row["files_second_half"] > row["files_first_half"] + 2:
        wrong.append(
            f"{row['files_first_half']} open files stay, then "
            f"{row['files_second_half']}"
        )
    if float(row["folder_faulty_mib"]) > 2 * float(row["folder_straight_mib"]):
        wrong.append(f"the folder grew to {row['folder_faulty_mib']} MiB")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--epochs", type=int, default=30, help="without --minutes")
    parser.add_argument("--faults", type=int, default=6, help="without --minutes")
    parser.add_argument("--dry", action="store_true", help="write no row")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(work) / "xla"))
        faults = None if asked.minutes is not None else asked.faults
        row = soak(asked.minutes, asked.epochs, faults, Path(work))
    wrong = verdict(row)
    row |= {
        "passed": not wrong,
        "device": "cpu",
        "jax": environment.installed("jax"),
        "commit": environment.commit(),
        "date": datetime.date.today().isoformat(),
    }
    if not asked.dry:
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    print(json.dumps(row))
    print("\n".join(wrong) or "passed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
