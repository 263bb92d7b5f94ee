"""What `flax-lstm bench` does, from its options to files and tables."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from flax_lstm.bench.options import BenchOptions
from flax_lstm.bench.tables import WIDE
from flax_lstm.config import UserError
from flax_lstm.host_memory import keep_freed_memory

T = TypeVar("T")


def bench(options: BenchOptions, screen: Console) -> None:
    """Runs, lists or compares, and prints what came of it.

    Raises:
      UserError: If an option cannot be met; says which values can.
    """
    if not screen.is_terminal:
        screen.width = max(screen.width, WIDE)  # a file has room for all columns
    # JAX would take most of a GPU's memory, of which torch needs its part.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.compare is not None:
        return compare_runs(*options.compare, screen)
    from flax_lstm.bench.peers import catalogue
    from flax_lstm.bench.shapes import SHAPES, SMOKE_SHAPES

    found = catalogue.implementations()
    if options.catalogue:
        from flax_lstm.bench.tables import catalogue_tables

        for table in catalogue_tables(list(SHAPES.values()), list(found.values())):
            screen.print(table)
        return None
    check_empty(options.out)
    names = options.implementations
    if options.smoke and not names:
        names = catalogue.SMOKE
    shapes = chosen("shapes", options.shapes, SMOKE_SHAPES if options.smoke else SHAPES)
    return race(options, shapes, chosen("implementations", names, found), screen)


def chosen(option: str, names: Sequence[str], known: Mapping[str, T]) -> list[T]:
    """Returns what the names stand for, all where there are none.

    Raises:
      UserError: If a name is not known.
    """
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--{option}: there is no {', '.join(unknown)}; "
            f"expected any of {', '.join(known)}."
        )
    return [known[name] for name in names or known]


def check_empty(folder: Path | None) -> None:
    """Raises UserError where a folder has results, which a run would write over."""
    for name in ("results.json", "results.csv"):
        if folder is not None and (folder / name).exists():
            raise UserError(
                f"--out {folder} holds {name}, which would be written over; give "
                "another folder. Nothing was changed."
            )


def check_numbers(options: BenchOptions) -> None:
    """Raises UserError for numbers that no race can have."""
    for name, least in (("rounds", 1), ("budget_s", 0), ("pause_s", 0), ("seed", 0)):
        value = getattr(options, name)
        if not least <= value < math.inf:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least {least}; got {value}."
            )


def race(
    options: BenchOptions, shapes: Sequence, contenders: Sequence, screen: Console
) -> None:
    """Times, and saves after each case so that an interrupted run loses nothing."""
    import jax

    # Before anything is allocated: see `BenchOptions.system_malloc`.
    kept = not options.system_malloc and keep_freed_memory()

    from flax_lstm.bench import machine, plots, tables
    from flax_lstm.bench.limits import Limits, measure_limits
    from flax_lstm.bench.results import Results, limited, summary_lines
    from flax_lstm.bench.shapes import MODES
    from flax_lstm.bench.suite import run_case
    from flax_lstm.bench.work import ITEMSIZE

    modes = chosen("modes", options.modes, {name: name for name in MODES})
    dtypes = chosen("dtypes", options.dtypes, {name: name for name in ITEMSIZE})
    check_numbers(options)
    missing = {one.name: reason for one in contenders if (reason := one.missing())}
    if len(missing) == len(contenders):
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise UserError(f"--implementations: none of them can run here. {reasons}.")
    cases = [
        (shape, mode, dtype)
        for dtype, shape, mode in itertools.product(dtypes, shapes, modes)
        if mode in shape.modes or (mode in options.modes and mode == "step")
    ]
    if not cases:
        raise UserError(
            f"--modes {' '.join(options.modes)}: none of the shapes chosen is timed in "
            "it; see --catalogue."
        )
    # A program read from disk would pass for one that compiles fast.
    jax.config.update("jax_enable_compilation_cache", False)
    common, surroundings = machine.provenance(), machine.surroundings(kept)
    folder = options.out or next_folder(Path("benchmarks"))
    screen.print(
        f"{common['device']}, {common['processor']}, {common['threads']} threads, "
        f"jax {common['jax']}; load {surroundings['load_1min']}"
    )
    for name, reason in missing.items():
        screen.print(f"missing {name}: {reason}", markup=False)

    def measured(budget_s: float) -> Limits:
        return measure_limits(tuple(dtypes), smoke=options.smoke, budget_s=budget_s)

    limits = measured(0.02 if options.smoke else 0.5)
    screen.print("\n".join(tables.limits_lines(limits)), markup=False)
    rows, told = [], set()
    results = Results(rows, limits.to_dict(), surroundings)
    for shape, mode, dtype in cases:
        those = run_case(
            shape,
            mode,
            dtype,
            contenders,
            seed=options.seed,
            common=common,
            rounds=min(options.rounds, 3) if options.smoke else options.rounds,
            budget_s=0.0 if options.smoke else options.budget_s,
            pause_s=options.pause_s,
        )
        limits = limits.merged(measured(0.02 if options.smoke else 0.1))
        those = [limited(row, limits) for row in those]
        rows = [limited(row, limits) for row in (*rows, *those)]
        title = f"{shape.name} {mode} {dtype}: {shape.about}"
        screen.print(tables.rows_table(title, those, screen.width))
        for line in tables.untimed_lines(those):
            if line not in told:
                screen.print(line, markup=False)
                told.add(line)
        results = Results(rows, limits.to_dict(), surroundings, summary_lines(rows))
        results.save(folder)
    screen.print("\n".join(results.summary), markup=False)
    if reason := plots.missing():
        screen.print(reason, markup=False)
    else:
        plots.save_plots(results, folder / "plots")
    screen.print(f"The results are in {folder}.", markup=False)


def compare_runs(before: Path, after: Path, screen: Console) -> None:
    """Prints what differs between two runs."""
    from flax_lstm.bench import tables
    from flax_lstm.bench.compare import compare
    from flax_lstm.bench.results import Results

    found = compare(Results.load(before).rows, Results.load(after).rows)
    screen.print(tables.comparison_table(found))
    for line in tables.refused_lines(found):
        screen.print(line, markup=False)


def next_folder(parent: Path) -> Path:
    """Returns the first of parent/1, parent/2, ... that does not exist."""
    numbers = itertools.count(1)
    return next(p for n in numbers if not (p := parent / str(n)).exists())
