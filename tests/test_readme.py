"""The README: its Python runs, its commands parse, its first screen is what it was."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from flax_lstm import cli, run
from flax_lstm.config import Config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)


def commands() -> list[str]:
    """Every `flax-lstm` command in the README, without what stands around it."""
    lines = "\n".join(code for kind, code in BLOCKS if kind == "bash").splitlines()
    found = re.findall(r"flax-lstm ([^|>\n]+)", "\n".join(lines))
    inline = re.findall(r"`flax-lstm ([^`]+)`", README)
    return [one.strip() for one in found + inline]


def test_the_python_blocks_run_in_order(monkeypatch, tmp_path, capsys):
    """As they stand, but for the size of the run that is trained."""
    real = run.train

    def quick(config: Config, folder=None, **options):
        return real(
            dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, batch_size=512, buckets=1),
                model=dataclasses.replace(
                    config.model, features=(8,), embedding_size=8
                ),
                training=dataclasses.replace(config.training, epochs=1),
            ),
            folder,
            **options,
        )

    monkeypatch.setattr(run, "train", quick)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in FENCE.finditer(README):
        if block[1] == "python":
            lines_before = README.count("\n", 0, block.start(2))
            source = "\n" * lines_before + block[2]  # so that errors name the line
            exec(compile(source, "README.md", "exec"), namespace)
    accuracy, score, trace = capsys.readouterr().out.splitlines()
    assert 0 <= float(accuracy) <= 1
    assert 0 < float(score) < 1
    assert trace.startswith("[('i', 0.")


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    argv = shlex.split(command)
    if argv[-1] == "--help":
        assert cli.main(argv) == 0
    else:
        assert dataclasses.is_dataclass(cli.parse(argv))


def test_there_are_commands_to_parse():
    verbs = {shlex.split(command)[0] for command in commands()}
    assert verbs == {"train", "evaluate", "predict", "trace", "bench"}


def test_the_first_screen_has_both_install_lines():
    """A screen is 40 lines."""
    screen = "\n".join(README.splitlines()[:40])
    for line in (
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/flax-lstm train",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && "
        ".venv/bin/pytest",
    ):
        assert f"\n{line}\n" in screen


def test_every_place_in_the_layout_exists():
    root = Path(__file__).parents[1]
    rows = re.findall(r"^\| (`.+?) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        first, *rest = re.findall(r"`([^`]+)`", row)
        folder = (root / first).parent
        for place in (root / first, *(_beside(root, folder, name) for name in rest)):
            assert place.exists(), place


def _beside(root: Path, folder: Path, name: str) -> Path:
    return root / name if "/" in name else folder / name


def named_tests() -> list[str]:
    """What the README's table of features names as shown by a test."""
    return re.findall(r"`((?:parity/)?test_\w+\.py::\w+)`", README)


def test_the_table_of_features_names_tests():
    assert len(named_tests()) > 20


@pytest.mark.parametrize("named", sorted(set(named_tests())))
def test_a_test_named_in_the_readme_exists(named):
    file, name = named.split("::")
    source = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE)
