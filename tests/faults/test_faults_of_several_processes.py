"""One run by several processes: the same numbers, and an end of all when one ends.

Two processes with two devices each, over Gloo on this machine. Each test names the row
of faults that it stands for.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_runs import KILL, Ended, at_step, end, run, start

from flax_lstm.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from flax_lstm.epochs import ARREARS
from flax_lstm.leaves import digest
from flax_lstm.run import Run

pytestmark = pytest.mark.usefixtures("compilation_cache")

ARGUMENTS = (
    *("--features", "8", "--embedding-size", "4", "--embedding-scale", "0.5"),
    *("--buckets", "1", "--max-length", "8", "--batch-size", "10"),
    *("--learning-rate", "0.01", "--dropout", "0.1", "--patience", "None"),
    *("--no-sparse-embedding", "--weight-decay", "0", "--clip-norm", "0.5"),
    *("--test-with", "last"),
)
"""64 rows in batches of 10, the last of 4: on four devices a batch has two filler rows,
and the second process nothing else in the last batch."""
STEPS = 21

MEET = "import flax_lstm.distributed as d; d.START_LIMIT_S = 60; d.HEARTBEAT_S = 10\n"
"""Shorter limits than those of a cluster."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def train_argv(source: Path, folder: Path, epochs: int, *argv: str) -> list[str]:
    """Returns the arguments of a run."""
    where = ("--data", str(source), "--out", str(folder), "--epochs", str(epochs))
    return ["train", *where, *ARGUMENTS, *argv]


def alone(
    source: Path, folder: Path, *argv: str, devices: int = 1, epochs: int = 3
) -> Ended:
    """Trains in one process."""
    return run(
        *train_argv(source, folder, epochs, *argv),
        env={"JAX_NUM_CPU_DEVICES": str(devices)},
    )


def begin(
    source: Path,
    folder: Path,
    *argv: str,
    faults: tuple = ("", ""),
    count: int = 2,
    epochs: int = 3,
) -> list:
    """Starts as many processes as there are faults, with two devices each."""
    address = f"localhost:{free_port()}"
    return [
        start(
            *train_argv(source, folder, epochs, *argv),
            *("--distributed", address, "--process-id", str(number)),
            *("--process-count", str(count)),
            fault=MEET + fault,
            env={"JAX_NUM_CPU_DEVICES": "2"},
        )
        for number, fault in enumerate(faults)
    ]


def together(*args, **kwargs) -> list[Ended]:
    """Trains in two processes to their end."""
    return [end(process) for process in begin(*args, **kwargs)]


def numbers(folder: Path) -> tuple[list, list[dict], dict]:
    """Returns the parameters, the record of each epoch, and the result of the test."""
    trained = Run.load(folder)
    return (
        [np.asarray(p) for p in jax.tree.leaves(trained.params)],
        trained.metrics["epochs"],
        trained.metrics["test"],
    )


def assert_same(folder: Path, other: Path) -> None:
    """Parameters to float32 rounding, and every row counted once.

    Sums over rows go in another order, and the differences of 21 steps of AdamW add up:
    each step is of 0.01 at the most, so a part in 500 of one step.
    """
    (params, epochs, test), (want, want_epochs, want_test) = map(
        numbers, (folder, other)
    )
    for got, wanted in zip(params, want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
    for got, wanted in zip(epochs, want_epochs, strict=True):
        for name in ("epoch", "step", "batch", "tokens", "best", "validation_accuracy"):
            assert got[name] == wanted[name], name
        for name in ("train_loss_mean", "validation_loss", "train_accuracy"):
            assert got[name] == pytest.approx(wanted[name], rel=1e-5), name
    counts = {name: n for name, n in want_test.items() if name != "loss"}
    assert {name: test[name] for name in counts} == counts
    assert sum(test[n] for n in test if "tives" in n) == test["count"] == 8


@pytest.fixture(scope="module")
def one_device(source, tmp_path_factory) -> Path:
    """The run that all others must be equal to."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended = alone(source, folder)
    assert ended.code == 0, ended.err
    return folder


COUNT_ENCODED = """
import atexit, json
from flax_lstm.text import TextTokenizer
encode, encoded = TextTokenizer.encode_flat, []
def counted(self, texts, limit):
    encoded.extend(texts)
    return encode(self, texts, limit)
TextTokenizer.encode_flat = counted
atexit.register(lambda: json.dump(encoded, open({path!r}, "w")))
"""


@pytest.fixture(scope="module")
def two_processes(source, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """The same run by two processes with two devices each."""
    folder = tmp_path_factory.mktemp("two") / "run"
    said = [str(folder.with_name(f"encoded-{number}")) for number in range(2)]
    faults = tuple(COUNT_ENCODED.format(path=path) for path in said)
    ended = together(source, folder, faults=faults)
    assert [one.code for one in ended] == [0, 0], ended
    return folder, ended


def test_uneven_rows_per_process(source, tmp_path, one_device, two_processes):
    """Two processes of two devices, one of four, and one device give one result."""
    four = tmp_path / "four"
    ended = alone(source, four, "--parallel", "sharded", devices=4)
    assert ended.code == 0, ended.err
    assert_same(four, one_device)
    assert_same(two_processes[0], one_device)


def test_each_row_is_encoded_by_one_process(source, two_processes):
    """Half of the rows by each, and all of them by the two."""
    folder, _ = two_processes
    encoded = [
        json.loads(folder.with_name(f"encoded-{number}").read_text())
        for number in range(2)
    ]
    with open(source, encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert sorted(encoded[0] + encoded[1]) == sorted(texts)
    assert len(encoded[0]) == pytest.approx(len(texts) / 2, abs=2)


def test_bad_row_in_the_part_of_one_process(source, tmp_path):
    """All end with the file and the line of it, before there is a run."""
    path = tmp_path / "bad.csv"
    path.write_text(source.read_text() + "a song,1.5\n")
    ended = together(path, tmp_path / "run")
    assert [one.code for one in ended] == [2, 2], ended
    lines = len(path.read_text().splitlines())
    words = f"line {lines} of {path} has the label '1.5'; a label is"
    assert words in ended[0].err.strip().splitlines()[-1]
    assert "process 1 of 2: " in ended[0].err.strip().splitlines()[-1]
    assert words in ended[1].err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_units_spread_over_processes_on_cpus_are_refused(source, tmp_path):
    """Gloo mixes up what the devices exchange in every time step, or hangs."""
    ended = together(source, tmp_path / "run", "--mesh", "data=1,model=4")
    assert [one.code for one in ended] == [2, 2], ended
    assert all("give data=N alone" in one.err for one in ended)


TABLE = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)

LEAVES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from flax_lstm import distributed
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.mesh import make_mesh
folder, address, number = sys.argv[1:]
distributed.join(address, int(number), 2)
mesh = make_mesh("data=2,model=2", jax.devices())
table = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
def on(*spec, table=table):
    where = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(table.shape, where, lambda at: table[at])
own = table + int(number)
state = {"local": jnp.asarray(3), "scalar": on(table=table[0, 0]), "whole": on(),
         "rows": on("data"), "columns": on(None, "model"),
         "both": on(("data", "model")), "copies differ": on(table=own),
         "columns differ": on(None, "model", table=own)}
try:
    np.asarray(state["rows"])
except RuntimeError as error:
    assert "non-addressable" in str(error)
else:
    raise AssertionError("a part was taken for the whole")
gather = multihost_utils.process_allgather
def of_digests(array, **how):
    assert array.dtype != np.float32, "a leaf was gathered"
    return gather(array, **how)
multihost_utils.process_allgather = of_digests
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, {})
"""


def test_process_local_leaf_in_saved_state(tmp_path):
    """And leaves spread over processes, each of which saves and digests its parts.

    JAX refuses to read such a leaf (`np.asarray(global array)`), Orbax to save a local.
    """
    address = f"localhost:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, str(tmp_path), address, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    for ended in map(end, children):
        assert ended.code == 0, ended.err
    same = ("whole", "rows", "columns", "both")
    template = {
        name: jax.ShapeDtypeStruct(TABLE.shape, np.float32)
        for name in (*same, "copies differ", "columns differ")
    }
    template["local"] = jax.ShapeDtypeStruct((), np.int32)
    template["scalar"] = jax.ShapeDtypeStruct((), np.float32)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        state, _ = checkpoints.restore_last(template)
    assert (int(state["local"]), float(state["scalar"])) == (3, float(TABLE[0, 0]))
    for name in same:
        np.testing.assert_array_equal(state[name], TABLE)
    # Copies that should be equal and are not: what each wrote, and it verifies.
    np.testing.assert_array_equal(state["copies differ"][:256], TABLE[:256])
    np.testing.assert_array_equal(state["copies differ"][256:], TABLE[256:] + 1)
    np.testing.assert_array_equal(state["columns differ"], TABLE)
    record = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    digests = {name: leaf["sha256"] for name, leaf in record["leaves"].items()}
    top, bottom = "0:256,0:64", "256:512,0:64"
    halves = {top: digest(TABLE[:256]), bottom: digest(TABLE[256:])}
    assert digests["whole"] == digests["rows"] == halves
    assert digests["columns"].keys() == {"0:512,0:32", "0:512,32:64"}
    assert len(digests["both"]) == 4
    assert digests["scalar"] == digest(TABLE[:1, :1])
    # Random numbers hardly get smaller: the second process wrote half of four leaves.
    files = {
        number: [p for p in tmp_path.glob(f"1/state/*process_{number}/d/*")]
        for number in range(2)
    }
    written = {n: sum(p.stat().st_size for p in files[n]) for n in files}
    assert 1.7 < written[1] / TABLE.nbytes < 2.1, written
    assert 3.4 < written[0] / TABLE.nbytes < 4.1, written
    for number in range(2):  # whoever wrote a bit, it is under a digest
        path = max(files[number], key=lambda p: p.stat().st_size)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        with (
            Checkpoints(tmp_path, read_only=True) as checkpoints,
            pytest.warns(CheckpointWarning, match="is damaged"),
            pytest.raises(CheckpointError, match="no intact checkpoint"),
        ):
            checkpoints.restore_last(template)
        path.write_bytes(whole)


def test_one_process_speaks_and_writes(two_processes):
    """Gloo's own lines are not on the standard output, which programs may read."""
    folder, (first, second) = two_processes
    assert "Test Accuracy" in first.out
    assert "Gloo" not in first.out + second.out
    assert second.out == ""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["devices"]) == 4


def test_save_on_two_by_two_devices_restore_on_one(
    source, tmp_path, one_device, two_processes
):
    """Trained for two epochs more, each on another topology: 2 x 2, then 1, then 2."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    constant = ("--schedule", "constant", "--warmup-fraction", "0")
    ended = together(source, folder, *constant, epochs=1)
    assert [one.code for one in ended] == [0, 0], ended
    for epochs, devices in ((2, 1), (3, 2)):
        mode = ("--parallel", "sharded" if devices > 1 else "jit")
        more = ("--resume", *constant, *mode)
        ended = alone(source, folder, *more, devices=devices, epochs=epochs)
        assert ended.code == 0, ended.err
    ended = alone(source, straight, *constant)
    assert ended.code == 0, ended.err
    assert_same(folder, straight)


@pytest.mark.parametrize("dies", [0, 1], ids=["the coordinator", "a worker"])
def test_one_process_dies(source, tmp_path, one_device, dies):
    """Killed at step 12; the other one ends with it, and one process goes on."""
    folder, faults = tmp_path / "run", ["", ""]
    faults[dies] = at_step(12, KILL)
    processes = begin(source, folder, "--save-every", "5", faults=tuple(faults))
    died, survivor = end(processes[dies]), end(processes[1 - dies])
    assert died.code == -signal.SIGKILL
    assert survivor.code == 1, survivor.err
    last = survivor.err.strip().splitlines()[-1]
    assert "another process of the run has ended" in last
    assert "--resume" in last
    assert "Traceback" not in survivor.err
    resumed = alone(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    assert_same(folder, one_device)


def test_fewer_processes_than_promised(source, tmp_path):
    limit = "d.START_LIMIT_S = 4\n"
    began = time.monotonic()
    ended = together(source, tmp_path / "run", faults=(limit, limit), count=3)
    assert time.monotonic() - began < 60
    for one in ended:
        assert one.code in (1, 2), one.err
        assert "processes [2] of 3 did not come to localhost:" in one.message()
    assert not (tmp_path / "run").exists()


OTHER_DATA = """
import dataclasses, flax_lstm.data as data
load = data.load
def other(*args, **kwargs):
    corpus = load(*args, **kwargs)
    found = {**corpus.summary, 'rows': {'train': 63}}
    return dataclasses.replace(corpus, summary=found)
data.load = other
"""


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            "import sys; sys.argv[sys.argv.index('--features') + 1] = '7'",
            "configuration.model.features",
        ),
        ("import flax_lstm.environment as e; e.installed = str", "code.packages"),
        (OTHER_DATA, "data.rows"),
        ("import flax_lstm.data as b; b.find_classes = lambda *_: 1 / 0", "division"),
    ],
    ids=["configuration", "code", "data", "an error of one"],
)
def test_different_config_or_code_per_process(source, tmp_path, fault, named):
    """Found at the start, by all processes, and said with the number of the process."""
    first, second = together(source, tmp_path / "run", faults=("", fault))
    assert {first.code, second.code} <= {1, 2}
    assert "process 1" in first.err.strip().splitlines()[-1]
    assert named in first.err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_file_system_not_shared(source, tmp_path):
    """The second process sees another directory where the first one writes."""
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    fault = (
        "import pathlib\n"
        "read = pathlib.Path.read_text\n"
        "def elsewhere(self, *args, **kwargs):\n"
        f"    path = str(self).replace({str(folder)!r}, {str(other)!r})\n"
        "    return read(pathlib.Path(path), *args, **kwargs)\n"
        "pathlib.Path.read_text = elsewhere\n"
    )
    for one in together(source, folder, faults=("", fault)):
        assert one.code == 2, one.err
        last = one.err.strip().splitlines()[-1]
        assert f"{folder} is not the folder that process 0 writes" in last
    assert not folder.exists()


@pytest.mark.parametrize("told", ["one", "both"])
def test_sigterm_after_initialize(source, tmp_path, one_device, told):
    """JAX's preemption service would swallow it; all save at one step, and exit 143."""
    folder = tmp_path / "run"
    fault = at_step(9, "os.kill(os.getpid(), signal.SIGTERM)")
    faults = (fault if told == "both" else "", fault)
    for one in together(source, folder, faults=faults):
        assert one.code == 128 + signal.SIGTERM, one.err
    # Asked in step 9, told in step 10, heard when that is read, and so before step 13.
    saved = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert max(saved) == 10 + ARREARS
    # Within an epoch: by as many processes, and by another number of them.
    resume = together if told == "both" else lambda *args: [alone(*args)]
    for resumed in resume(source, folder, "--resume"):
        assert resumed.code == 0, resumed.err
    assert_same(folder, one_device)
