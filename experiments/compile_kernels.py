"""Do the kernels compile for the accelerators that are not here, and what do they cost?

Compiles each kernel ahead of time with the vendor's own compiler, on any machine, and
counts what it made of it: of a TPU's, VLIW bundles of one time step and vector memory
(`compile_for_tpu.py`); of a Hopper GPU's, registers, spills, shared memory and the
instructions of the time loop (`compile_for_hopper.py`). All are the same at every run;
`kernels/budgets.csv` holds them, and a kernel that exceeds its row by more than 5 %
fails, as does one that spills, and one that does not compile. Another JAX makes other
code of the same kernel: with a version that is not the budget's, only the latter two.

    python experiments/compile_kernels.py                  compare with the budgets
    python experiments/compile_kernels.py --write          set the budgets anew
    python experiments/compile_kernels.py --only h100 --kernel "single backward"

Which kernels at which shapes: `kernel_cases.py`, which also says how to add one. The
compilers, in the versions that fit the installed JAX, are installed into `--cache` at
the first use (libtpu 1.3 GB, CUDA 0.7 GB): $FLAX_LSTM_COMPILERS, else
flax-lstm/compilers in the user's cache folder.
"""

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import compile_for_hopper
import compile_for_tpu
from kernel_cases import HOPPER, TPU, Case

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "kernels" / "budgets.csv"
SLACK = 1.05
KEY = ("target", "kernel", "dtype", "T", "B", "I", "H")
COSTS = (*compile_for_tpu.COSTS, *compile_for_hopper.COSTS)
TARGETS: dict[str, tuple[ModuleType, list[Case]]] = {
    **dict.fromkeys(compile_for_tpu.TARGETS, (compile_for_tpu, TPU)),
    **dict.fromkeys(compile_for_hopper.TARGETS, (compile_for_hopper, HOPPER)),
}


def run(target: str, chosen: list[Case], cache: Path) -> list[dict[str, Any]]:
    """Compiles for one target in a process of its own, for it loads a compiler once."""
    compiler, _ = TARGETS[target]
    made = {"jax": version("jax"), "compiler": compiler.made_with(cache)}
    rows = []
    with tempfile.TemporaryDirectory() as dump:
        asked = json.dumps([target, dump, [dataclasses.astuple(c) for c in chosen]])
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", asked],
            env=os.environ | compiler.environment(cache, dump),
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout or ():
            if line.startswith("{"):
                rows.append(made | json.loads(line))
                report(rows[-1])
        if process.wait():
            raise SystemExit(f"compiling for {target} ended with {process.returncode}")
    return rows


def child(target: str, dump: str, chosen: list[list[Any]]) -> None:
    """Compiles in this process; prints a row for each case."""
    compiler, _ = TARGETS[target]
    place = compiler.sharding(target)
    for case in (Case(*values) for values in chosen):
        row = {"target": target} | dataclasses.asdict(case)
        for old in Path(dump).iterdir():
            old.unlink()
        try:
            row |= compiler.compiled(case, place, Path(dump))
        # As lowering and compiler raise: of a case that fails the others still count.
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
        print(json.dumps(row), flush=True)


def report(row: dict[str, Any]) -> None:
    case = " ".join(str(row[name]) for name in KEY)
    told = ", ".join(f"{row[cost]} {cost}" for cost in COSTS if cost in row)
    print(f"{case}: {row.get('error') or told}", flush=True)


def judged(rows: list[dict[str, Any]], budgets: list[dict[str, str]]) -> list[str]:
    """Returns what is wrong with the rows.

    That is, each that did not compile, spills, has no budget or exceeds it.
    """
    allowed = {tuple(row[name] for name in KEY): row for row in budgets}
    wrong = []
    for row in rows:
        key = tuple(str(row[name]) for name in KEY)
        case, budget = " ".join(key), allowed.get(key)
        if "error" in row:
            wrong.append(f"{case}: does not compile")
            continue
        if row.get("spill_bytes"):
            wrong.append(f"{case}: spills {row['spill_bytes']} bytes of its registers")
        if budget is None:
            wrong.append(f"{case}: has no row in {BUDGETS.name}; use --write")
            continue
        if row["jax"] != budget["jax"]:
            continue
        wrong += [
            f"{case}: {row[cost]} {cost}, budget {budget[cost]}"
            for cost in COSTS
            if cost in row and row[cost] > SLACK * int(budget[cost])
        ]
    return wrong


def verdict(rows: list[dict[str, Any]], budgets: list[dict[str, str]]) -> str:
    """Says what was found of rows with which nothing is wrong."""
    versions = {row["jax"] for row in budgets}
    if all(row["jax"] in versions for row in rows):
        return f"{len(rows)} kernels within their budgets"
    return (
        f"{len(rows)} kernels compile and none spills; not held to their budgets, "
        f"which are those of jax {', '.join(sorted(versions))}"
    )


def write(rows: list[dict[str, Any]]) -> None:
    """Puts the rows in the place of those of the same cases; keeps the cases' order."""
    fields = [*KEY, *COSTS, "plan", "jax", "compiler"]
    table = {tuple(str(row[name]) for name in KEY): row for row in [*read(), *rows]}
    order = {
        (target, *map(str, dataclasses.astuple(case))): place
        for place, (target, case) in enumerate(
            (target, case) for target, (_, cases) in TARGETS.items() for case in cases
        )
    }
    with BUDGETS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, fields, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(table[key] for key in order if key in table)


def read() -> list[dict[str, str]]:
    if not BUDGETS.exists():
        return []
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def default_cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get("FLAX_LSTM_COMPILERS")
    return Path(named or home / "flax-lstm" / "compilers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--kernel", help="only the cases whose text contains this")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
        return
    rows = []
    for target in options.only or TARGETS:
        _, cases = TARGETS[target]
        text = options.kernel or ""
        chosen = [case for case in cases if text in str(dataclasses.astuple(case))]
        if not chosen:
            continue
        made = run(target, chosen, options.cache)
        if options.write:
            write([row for row in made if "error" not in row])
        rows += made
    if not rows:
        raise SystemExit("no such case; see kernel_cases.py")
    budgets = read()
    found = judged(rows, budgets)
    print("\n".join(found) or verdict(rows, budgets))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
