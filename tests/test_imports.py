"""Which file may import which, read from the source; importing does no work."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A node is a file or a folder directly under flax_lstm/; the kernels and the
# experiments are one node each. Every file stands here, with the nodes that it may
# import: a new arrow is a decision, so it is written down.
ARROWS = {
    "__init__": "cell directions over_time sequence",
    "cell": "",
    "config": "choice",
    "pooling": "",
    "demo_corpus": "",
    "dropout": "",
    "variants": "cell",
    "loop": "",
    "checks": "cell loop",
    "choice": "loop kernels",
    "statement": "cell loop",
    "lowering": "loop statement kernels",
    "foreign": "cell loop lowering statement",
    "cudnn": "cell choice loop",
    "derivative": "cell loop",
    "over_time": "cell checks loop cudnn foreign derivative kernels",
    "sequence": "cell loop checks choice over_time",
    "directions": "cell choice loop sequence",
    "regularize": "cell dropout over_time",
    "convert": "cell variants",
    "initializers": "cell",
    "layers": "cell checks choice config directions dropout loop over_time sequence",
    "nnx": "cell choice config directions initializers layers pooling",
    "linen": "cell choice config directions initializers layers pooling",
    "rollcall": "config",
    "distributed": "config rollcall",
    "labels": "config",
    "sharing": "distributed",
    "word_counts": "",
    "text": "config",
    "vocabulary": "config sharing text word_counts",
    "examples": "config",
    "batching": "config examples",
    "shared_rows": "batching distributed examples",
    "columns": "config labels",
    "formats": "columns config labels",
    "parquet": "columns config host_memory sharing",
    "stretches": "config sharing",
    "shared_files": "columns config formats parquet sharing stretches",
    "text_folder": "columns config formats sharing stretches",
    "sources": "columns config demo_corpus formats parquet shared_files sharing "
    "stretches text_folder",
    "partition": "columns config batching",
    "encoding": "config examples partition shared_rows sharing text vocabulary",
    "data": "config labels text batching encoding examples partition shared_rows "
    "sharing sources",
    "leaves": "",
    "manifest": "config host_memory leaves",
    "storage": "config distributed leaves manifest",
    "checkpoint": "config distributed folder leaves manifest storage",
    "feeding": "config data",
    "optim": "config",
    "mesh": "config",
    "parallel": "config mesh",
    "rows": "",
    "finite": "",
    "train": "config optim parallel rows",
    "report": "events",
    "folder": "config distributed",
    "environment": "",
    "events": "config",
    "startup": "",
    "host_memory": "",
    "progress": "",
    "stopping": "",
    "history": "folder",
    "epochs": "checkpoint config data distributed events feeding finite history "
    "progress startup stopping train",
    "settings": "config folder host_memory",
    "model_state": "checkpoint config train",
    "trained": "batching config data checkpoint environment folder history "
    "model_state settings train",
    "run": "config data checkpoint distributed environment epochs events folder "
    "history host_memory mesh model_state progress settings startup stopping train "
    "trained",
    "bench": "cell choice config convert environment host_memory sequence",
    "commands": "bench config distributed environment events report run settings "
    "stopping trained",
    "cli": "bench commands config distributed environment host_memory startup stopping",
    "__main__": "cli",
    "kernels": "cell",
    "experiments": "bench cell checkpoint cli config convert data derivative "
    "environment finite host_memory kernels leaves model_state nnx run train variants",
}
LIBRARIES = ("torch", "keras", "haiku", "equinox")
# Third-party packages that only these nodes touch.
OWNERS = {
    "datasets": {"parquet", "sources"},
    "tokenizers": {"text", "vocabulary"},
    "orbax": {"storage", "experiments"},
    "tyro": {"cli", "commands"},
    "rich": {"bench", "commands", "report", "experiments"},
    # Peers, which are raced and are no dependency.
    **{name: {"bench", "experiments"} for name in LIBRARIES},
}
# Executes what a file says (pickle and its kin), or would make a peer a dependency.
NEVER = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"} | {
    "tensorflow",
    "onnx",
}
PEERS = (*LIBRARIES, "matplotlib")


def sources() -> Iterator[tuple[str, Path]]:
    """Yields (node, file) for every file of the package, kernels and experiments."""
    for path in sorted((ROOT / "flax_lstm").rglob("*.py")):
        yield path.relative_to(ROOT / "flax_lstm").parts[0].removesuffix(".py"), path
    for node in ("kernels", "experiments"):
        for path in sorted((ROOT / node).rglob("*.py")):
            yield node, path


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (dotted name, line) of every import, inside functions too."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.name, statement.lineno
        elif isinstance(statement, ast.ImportFrom):
            dots = "." * statement.level
            yield dots + (statement.module or ""), statement.lineno
            if statement.module in ("flax_lstm", "flax_lstm_kernels"):
                for alias in statement.names:
                    yield f"{statement.module}.{alias.name}", statement.lineno


def target(name: str) -> str | None:
    """Returns the node that an import is of, None for one from outside.

    A name from flax_lstm/__init__ itself counts for nothing: it is in the core.
    """
    top, *rest = name.split(".")
    if top == "flax_lstm_kernels":
        return "kernels"
    return rest[0] if top == "flax_lstm" and rest and rest[0] in ARROWS else None


SOURCES = [pytest.param(*s, id=str(s[1].relative_to(ROOT))) for s in sources()]


def test_the_table_has_no_circle():
    order = graphlib.TopologicalSorter({n: a.split() for n, a in ARROWS.items()})
    assert list(order.static_order())


@pytest.mark.parametrize(("node", "path"), SOURCES)
def test_only_listed_arrows_exist(node, path):
    assert node in ARROWS, f"{path.name}: give {node!r} its row in ARROWS"
    allowed = {node, *ARROWS[node].split()}
    for name, line in imported(path):
        where = f"{path.name}:{line} imports {name}"
        assert not name.startswith("."), f"{where}: imports are absolute"
        assert target(name) in {None, *allowed}, f"{where}: not listed for {node!r}"


def test_every_listed_arrow_exists():
    found: dict[str, set[str | None]] = {node: set() for node in ARROWS}
    for node, path in sources():
        found[node] |= {target(name) for name, _ in imported(path)}
    for node, listed in ARROWS.items():
        unused = set(listed.split()) - found[node]
        assert not unused, f"{node!r} imports none of {sorted(unused)}: strike them"


@pytest.mark.parametrize(("node", "path"), SOURCES)
def test_outside_packages_are_touched_by_their_owners_only(node, path):
    for name, line in imported(path):
        where, top = f"{path.name}:{line} imports {name}", name.split(".")[0]
        assert node in OWNERS.get(top, {node}), f"{where}: only {OWNERS[top]} may"
        if node != "experiments":
            assert top not in NEVER, f"{where}: never"


def test_kernels_are_imported_inside_functions_only():
    """But for `target`, without any kernel: it has to be there before what is compiled.

    `test_startup.py` shows why.
    """
    light = ROOT / "kernels" / "flax_lstm_kernels" / "target.py"
    tops = {name.split(".")[0] for name, _ in imported(light)}
    assert tops <= {"contextlib", "jax", "typing"}
    for node, path in sources():
        if node in ("kernels", "experiments"):
            continue
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            words = ast.unparse(statement)
            for allowed in ("_kernels.target import", "_kernels import target"):
                words = words.replace(f"flax_lstm{allowed}", "")
            assert "flax_lstm_kernels" not in words, f"{path.name} at its top level"


def test_peers_and_plots_are_imported_inside_functions_only():
    for path in sorted((ROOT / "flax_lstm" / "bench").rglob("*.py")):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                words = ast.unparse(statement).replace(".", " ").split()
                assert words[1] not in PEERS, f"{path.name} at its top level"


def run(program: str) -> str:
    """Runs a program in a fresh interpreter and returns its standard output."""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


HEAVY = ["datasets", "tokenizers", "tyro", "orbax.checkpoint", "flax", "matplotlib"]


def test_importing_the_package_loads_nothing_heavy():
    got = run(f"import flax_lstm, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert got == "[]"


def test_importing_touches_no_device():
    """`jax_num_cpu_devices` can be set until a backend starts, and not after."""
    run(
        "import flax_lstm.linen, flax_lstm.nnx, flax_lstm.run, flax_lstm.cli, jax\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "assert jax.device_count() >= 1"
    )


def test_the_benchmarks_import_without_text_libraries_and_without_peers():
    """All of it but the command line, on a machine that has JAX and Flax alone."""
    hidden = ("datasets", "tokenizers", "tyro", "orbax", *PEERS)
    run(
        "import sys, pkgutil, importlib\n"
        f"for name in {hidden}: sys.modules[name] = None\n"
        "import flax_lstm.bench\n"
        "for found in pkgutil.walk_packages(flax_lstm.bench.__path__, "
        "'flax_lstm.bench.'): importlib.import_module(found.name)"
    )


def test_the_parts_without_text_import_without_the_text_libraries():
    run(
        "import sys\n"
        "for name in ('datasets', 'tokenizers', 'tyro'): sys.modules[name] = None\n"
        "import flax_lstm, flax_lstm.linen, flax_lstm.nnx, flax_lstm.train\n"
        "import flax_lstm.convert, flax_lstm.checkpoint"
    )
