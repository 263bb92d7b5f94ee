"""A run folder, a file or a configuration from a stranger: no code, no escape, no bomb.

What comes from outside is data: it is never executed, names no path
that is followed unasked, and claims no memory that is allocated unchecked.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest
from command_lines import error_of
from fault_runs import TINY
from small_runs import make_config

from flax_lstm import folder as files
from flax_lstm import model_state, run
from flax_lstm.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    CheckpointWarning,
)
from flax_lstm.config import MOST_JSON_BYTES, Config, UserError
from flax_lstm.leaves import describe, digest_json
from flax_lstm.run import Run

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for top in ("flax_lstm", "kernels", "experiments")
    for path in (ROOT / top).rglob("*.py")
)
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {("os", "system"), ("os", "popen"), ("torch", "load"), ("pd", "read_pickle")}
FLAGS = {"allow_pickle": False, "trust_remote_code": False, "shell": False}
FLAGS["weights_only"] = True


def code_from_data(source: str) -> list[str]:
    """Returns what in a Python source could run code that it was given as data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += (
                [node.module] if (node.module or "").split(".")[0] in MODULES else []
            )
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in BUILTINS:
                found.append(called.id)
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                pair = (called.value.id, called.attr)
                found += [".".join(pair)] if pair in METHODS else []
            for given in node.keywords:
                safe = FLAGS.get(given.arg or "")
                if safe is not None and not (
                    isinstance(given.value, ast.Constant) and given.value.value is safe
                ):
                    found.append(f"{given.arg}={ast.unparse(given.value)}")
    return found


def test_no_code_is_made_from_data():
    read = {path: code_from_data(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(read) > 50
    assert {path: found for path, found in read.items() if found} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "import os; os.system('ls')",
        "eval('1')",
        "def f(): exec(text)",
        "__import__(name)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "torch.load(path)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_scan_for_code_finds_it(line):
    assert len(code_from_data(line)) == 1


@pytest.mark.parametrize(
    "name",
    [
        *(files.CONFIG, files.SUMMARY, files.TOKENIZER),
        *("meta/metadata", "state/_METADATA", "_CHECKPOINT_METADATA"),
    ],
)
def test_json_of_any_size_is_not_read(trained, tmp_path, name):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    paths = list(folder.rglob(name))
    for path in paths:
        with path.open("r+b") as file:
            file.truncate(MOST_JSON_BYTES + 1)  # zeros that take no room on the disk
    words = r"no intact checkpoint" if "META" in name.upper() else r"larger than 256"
    with (
        warnings.catch_warnings(record=True, action="always") as said,
        pytest.raises((UserError, CheckpointError), match=words) as refused,
    ):
        Run.load(folder)
    everything = [str(refused.value), *(str(warning.message) for warning in said)]
    assert any("larger than 256 MiB" in text for text in everything)


def test_a_configuration_without_end_is_refused():
    with pytest.raises(UserError, match=r"/dev/zero: it is larger than 256 MiB"):
        Config.load("/dev/zero")


def test_json_nested_beyond_reason_is_refused(tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    assert "cannot read configuration" in error_of(
        capsys, "train", "--config", str(path)
    )


def test_a_checkpoint_may_not_claim_more_than_the_memory(trained, tmp_path):
    """Some kilobytes that say they hold 16 TB: configuration and all forged alike."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    config = json.loads((folder / files.CONFIG).read_text())
    config["model"]["features"] = [10**6]
    (folder / files.CONFIG).write_text(json.dumps(config))
    config = Config.from_dict(config)
    init, _ = model_state.classifier(config.model, trained[0].tokenizer.vocabulary_size)
    wanted, _ = describe(model_state.state_template(config, init))
    for path in folder.rglob("meta/metadata"):
        record = json.loads(path.read_text())
        record.pop("sha256")
        record["meta"]["config"] = config.to_dict()
        record["leaves"] = {
            name: {**vars(leaf), "sha256": "0"} for name, leaf in wanted.items()
        }
        record["sha256"] = digest_json(record)
        path.write_text(json.dumps(record))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointMismatchError, match=r"claims to hold arrays of"):
            Run.load(folder)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**26  # a thousandth of what one weight matrix would take


def some_steps(folder: Path, steps: range) -> None:
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            state = {"a": jnp.arange(4.0)}
            checkpoints.save(step, state, {}, metric=float(step))


def test_a_chunk_may_not_be_larger_than_its_array(tmp_path):
    """A chunk is unpacked as a whole: 4 GB of zeros fit into some bytes of a file."""
    import tensorstore

    folder = tmp_path / "steps"
    some_steps(folder, range(1))
    base = f"file://{folder / '0' / 'state'}/"
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": "a/"},
        "metadata": {"shape": [4], "chunks": [10**9], "dtype": "<f4"},
    }
    forged = tensorstore.open(spec, create=True, delete_existing=True).result()
    assert forged.shape == (4,)
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.warns(CheckpointWarning, match="chunks of a are larger than it is"),
        pytest.raises(CheckpointError, match="no intact checkpoint"),
    ):
        checkpoints.restore_last({"a": jnp.zeros(4)})


def test_links_in_a_run_folder_are_not_followed_on_delete(tmp_path):
    """One inside a step that is pruned, and one in the place of a step."""
    folder, outside = tmp_path / "steps", tmp_path / "outside"
    some_steps(folder, range(2))
    shutil.move(folder / "0", outside)
    (folder / "0").symlink_to(outside)
    (folder / "1" / "link").symlink_to(outside)
    before = sorted(path.name for path in outside.rglob("*"))
    with warnings.catch_warnings(record=True, action="always") as said:
        some_steps(folder, range(2, 6))
    assert sorted(path.name for path in outside.rglob("*")) == before
    assert sorted(path.name for path in folder.iterdir()) == ["0", "4", "5"]
    assert "0 is not a complete checkpoint" in "".join(str(w.message) for w in said)


def test_the_name_of_a_leaf_is_no_path(tmp_path):
    """Neither one that climbs out of the folder, nor one from the root."""
    folder, evil = tmp_path / "run" / "steps", tmp_path / "evil"
    state = {"../../../evil": jnp.arange(4.0), str(evil): jnp.arange(3.0)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {})
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore_last(state)
    assert {name: value.tolist() for name, value in restored.items()} == {
        "../../../evil": [0, 1, 2, 3],
        str(evil): [0, 1, 2],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in folder.parent.iterdir()] == ["steps"]


def contents(path: Path) -> dict[Path, bytes]:
    """Returns a file, or all files of a folder, with what they hold."""
    return {p: p.read_bytes() for p in (path, *path.rglob("*")) if p.is_file()}


def test_all_that_a_run_writes_has_one_of_its_names(trained):
    """Which are those that may not be links."""
    assert sorted(p.name for p in trained[0].folder.iterdir()) == sorted(files.NAMES)


@pytest.mark.parametrize("name", files.NAMES)
def test_a_run_does_not_go_on_through_a_link(trained, source, tmp_path, name):
    """Not by writing to a file outside, nor by pruning checkpoints there."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    outside = (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(outside)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is a link, to \S+outside; a run "):
        run.train(make_config(source, epochs=5), folder, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", files.NAMES)
def test_a_run_does_not_start_through_a_link(source, tmp_path, name):
    """Even where the link leads to what does not exist yet."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a link, to \S+outside; a run "):
        run.train(make_config(source, epochs=1), folder)
    assert not outside.exists()


def test_a_link_in_the_place_of_a_half_written_file_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f".{files.CONFIG}.tmp").symlink_to(precious)
    files.write_json(tmp_path / files.CONFIG, {})
    assert precious.read_text() == "mine"
    assert json.loads((tmp_path / files.CONFIG).read_text()) == {}


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "library", "../../evil"),
        ("model", "library", "os"),
        ("model", "implementation", "/tmp/evil.so"),
        ("data", "pipeline", "../x"),
    ],
)
def test_a_string_of_a_configuration_is_no_path(
    trained, tmp_path, section, name, value
):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    config = json.loads((folder / files.CONFIG).read_text())
    config[section][name] = value
    (folder / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{section}\.{name} must be one of"):
        Run.load(folder)


NO_NETWORK = """
import os, sys
touched = []
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
                 "socket.sendto", "urllib.Request", "http.client.connect"):
        touched.append(event)
        raise Touched(event)  # no Exception, which libraries would try again after
class Touched(BaseException):
    pass
sys.addaudithook(guard)
from flax_lstm.cli import main
"""


def test_no_network_is_touched_unless_a_hub_name_is_given(
    source, tmp_path, compilation_cache
):
    """Python's own audit events watch the commands; a Hub name proves the watch."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.csv.read_csv(source)
    pa.parquet.write_table(table, tmp_path / "texts.parquet")
    run = str(tmp_path / "run")
    tiny = [*TINY[: TINY.index("--epochs")], "--epochs", "1", "--patience", "None"]
    parquet = str(tmp_path / "texts.parquet")
    program = f"""{NO_NETWORK}
assert main(["train", "--data", {parquet!r}, "--test-data", {str(source)!r},
             "--out", {run!r}, *{tiny!r}]) == 0
assert main(["evaluate", {run!r}]) == 0
assert main(["evaluate", {run!r}, "--data", {str(source)!r}]) == 0
assert main(["predict", {run!r}, "a lovely film"]) == 0
assert main(["trace", {run!r}, "a lovely film"]) == 0
assert not touched, touched
try:
    main(["train", "--data", "owner/name"])
except Touched:
    pass
assert touched, "a Hub name reached no network: the watch sees nothing"
"""
    environment = {n: v for n, v in os.environ.items() if "OFFLINE" not in n}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "JAX_PLATFORMS": "cpu", "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
