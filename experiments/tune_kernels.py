"""Which way of cutting up the work is the fastest on the device that is here?

Times each kernel by several plans, at the shapes of `kernel_cases.py`, and puts those
that beat the heuristic's by 3 % or more into `flax_lstm_kernels/tuning.csv`, which the
kernels look into. Needs a TPU, or a GPU of compute capability 9.0.

    python experiments/tune_kernels.py                        say what is better
    python experiments/tune_kernels.py --write                and keep it
    python experiments/tune_kernels.py --kernel backward --limit 10
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax_lstm_kernels import gpu, tpu, tuning
from flax_lstm_kernels.gpu import plan as gpu_plan
from flax_lstm_kernels.target import Target, current
from flax_lstm_kernels.tpu import plan as tpu_plan
from kernel_cases import HOPPER, TPU, Case, functions

GAIN = 1.03  # less is noise
Timer = Callable[[Callable[..., Any], tuple[Any, ...]], float]


def refusal(target: Target) -> str | None:
    """Returns why nothing can be tuned here; None where it can."""
    if target.platform == "tpu" or (target.platform, target.kind) == ("cuda", "9.0"):
        return None
    return (
        "needs a TPU or a GPU of compute capability 9.0 (Hopper); the default device "
        f"is {target.platform} {target.kind}"
    )


def candidates(case: Case, target: Target) -> Iterator[tuple[tuning.Key, Any, Any]]:
    """Yields the key of a case, a plan, and keyword arguments that ask for it.

    The first is the heuristic's, or the one that was tuned before.
    """
    which: Any = "backward" if case.computes == "backward" else "forward"
    size = jnp.dtype(case.dtype).itemsize
    keep = case.computes != "inference"
    kind = target.kind or ""
    if target.platform == "tpu":
        module = tpu_plan
        inputs = 0 if which == "backward" else case.I
        sizes = module.Sizes(case.T, case.B, inputs, case.H, size, keep)
        hidden = module.up(case.H, module.LANES)
        limit = module.USABLE * module.vmem_limit(kind)
        key = tuning.Key("tpu", which, kind, hidden, case.B, size)
        first = module.choose(which, sizes, kind)[0]
        rest = [
            plan
            for plan in module.plans(which, sizes, kind)
            if module.vmem_bytes(which, sizes, plan) <= limit
        ]
    else:
        name: Any = case.kernel.split()[0]
        sizes = gpu_plan.Sizes(which, case.T, case.B, case.H, size, keep)
        key = tuning.Key(name, which, kind, case.H, case.B, size)
        found = gpu_plan.PLANNERS[name](sizes)
        if isinstance(found, str):
            return
        first = gpu_plan.tuned(found, sizes)
        # Those that do not fit do not compile, and are left out then.
        rest = [
            found._replace(rows=rows, stages=stages)
            for rows in (8, 16, 24, 32, 48, 64)
            for stages in (2, 3, 4)
        ]
    options = {"kind": kind} if target.platform == "tpu" else {}
    for plan in dict.fromkeys([first, *rest]):
        yield key, plan, {**options, "plan": plan}


def median_seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Returns the median time of a compiled function, after the first two calls."""
    taken = []
    for _ in range(12):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def tuned(
    case: Case, target: Target, *, limit: int, timer: Timer = median_seconds
) -> dict[str, Any] | None:
    """Times the plans of a case; returns the row of the best, None if the first is.

    Args:
      case: What to run.
      target: The device that is here.
      limit: How many plans to try.
      timer: Returns the seconds of one call.
    """
    module = tpu if target.platform == "tpu" else gpu
    times: dict[Any, float] = {}
    tried = list(candidates(case, target))[:limit]
    for _, plan, options in tried:
        function, like = functions(case, module, None, **options)
        try:
            run = jax.jit(function).lower(*like).compile()
            arguments = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
            # Every row as long as may be.
            lengths = jnp.full(case.B, case.T, jnp.int32)
            arguments = (*arguments[:-2], lengths, arguments[-1])
            times[plan] = timer(run, arguments)
        # As lowering, compiler and device say that a plan does not fit.
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"  {tuning.text_of(plan._asdict())}: {str(error)[:120]}")
            continue
        print(f"  {tuning.text_of(plan._asdict())}: {times[plan] * 1e6:.1f} us")
    if not times:
        return None
    key, *_ = tried[0]
    first, best = next(iter(times)), min(times, key=lambda plan: times[plan])
    if times[first] < GAIN * times[best]:
        return None
    return key._asdict() | {
        "plan": tuning.text_of(best._asdict()),
        "time": round(times[best] * 1e6, 1),
        "heuristic_time": round(times[first] * 1e6, 1),
        "jax": jax.__version__,
    }


def write(rows: list[dict[str, Any]], path: Path = tuning.TABLE) -> None:
    """Puts rows in the place of those of the same keys."""
    with path.open(newline="", encoding="utf-8") as file:
        old = {tuning.key_of(row): row for row in csv.DictReader(file)}
    new = {tuning.Key(*(row[name] for name in tuning.Key._fields)): row for row in rows}
    table = {**old, **new}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, tuning.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="", help="only cases that contain this")
    parser.add_argument("--limit", type=int, default=30, help="plans to try of a case")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    target = current()
    if reason := refusal(target):
        print(f"tune_kernels: {reason}", file=sys.stderr)
        raise SystemExit(2)
    rows = []
    for case in TPU if target.platform == "tpu" else HOPPER:
        if options.kernel not in case.kernel:
            continue
        print(case, flush=True)
        if row := tuned(case, target, limit=options.limit):
            rows.append(row)
            print(f"  better: {row['plan']}")
    if options.write and rows:
        write(rows)
    print(f"{len(rows)} plans better than the heuristic's")


if __name__ == "__main__":
    main()
