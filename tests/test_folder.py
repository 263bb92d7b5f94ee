"""The run folder: one writer, whole files, names that are free."""

import json

import pytest

from flax_lstm import folder
from flax_lstm.config import UserError


def test_the_second_writer_is_refused_until_the_first_is_done(tmp_path):
    with folder.writing(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
        with (
            pytest.raises(UserError, match=r"being written by process \d+ on "),
            folder.writing(tmp_path / "run"),
        ):
            pass
        # The refusal took nothing from the first.
        assert (tmp_path / "run" / folder.LOCK).read_text().startswith("process ")
    with folder.writing(tmp_path / "run"):
        pass
    assert folder.holds_run(tmp_path / "run")
    # Never a new file while another process may have this one open.
    assert (tmp_path / "run" / folder.LOCK).exists()


def test_where_nothing_began_all_that_was_made_goes_away(tmp_path):
    """The folders above as well, and where the checkpoints would have been."""
    for _ in range(2):
        with folder.writing(tmp_path / "a" / "b" / "run"):
            (tmp_path / "a" / "b" / "run" / folder.CHECKPOINTS).mkdir()
        assert not (tmp_path / "a").exists()


def test_where_nothing_began_what_was_there_stays(tmp_path):
    empty, used = tmp_path / "empty", tmp_path / "used"
    empty.mkdir()
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for where in (empty, used):
        with pytest.raises(KeyboardInterrupt), folder.writing(where):
            raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "notes.txt", "used"]


def test_a_folder_with_something_of_another_beside_it_stays(tmp_path):
    """As when two runs start in `runs/` at once, and one of them is refused."""
    with folder.writing(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "other").mkdir()
    assert [p.name for p in tmp_path.rglob("*")] == ["runs", "other"]


def test_a_folder_that_cannot_be_held_goes_away(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", full)
    with (
        pytest.raises(UserError, match=r"cannot write to the run folder .*No space"),
        folder.writing(tmp_path / "runs" / "run"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_refusal_of_a_second_writer_removes_nothing(tmp_path):
    """Even where nothing but the lock of the first is there yet."""
    with folder.writing(tmp_path / "run"):
        with pytest.raises(UserError), folder.writing(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / folder.LOCK).exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.json", "checkpoints/4"])
def test_what_has_the_name_of_a_run_s_file_is_not_written_over(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    words = rf"holds no run \(no config.json\), but {name.split('/')[0]}, which"
    with pytest.raises(UserError, match=words), folder.writing(tmp_path / "run"):
        pass
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [path.name]


def test_a_run_that_was_killed_before_it_had_a_name_can_begin_again(tmp_path):
    """It leaves its lock, and the folder that its checkpoints were to be in."""
    (tmp_path / folder.LOCK).touch()
    (tmp_path / folder.CHECKPOINTS).mkdir()
    with folder.writing(tmp_path):
        pass


def test_a_json_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    folder.write_json(path, {"ä": [1, None]})
    assert folder.read_json(path) == {"ä": [1, None]}
    with pytest.raises(TypeError):
        folder.write_json(path, {"cannot": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]}

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            folder.write_json(path, {"too": "large"})
    assert folder.read_json(path) == {"ä": [1, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*x\.json"):
        folder.read_json(path)


def test_what_cannot_be_looked_into_is_no_bare_error(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(folder.Path, "exists", refuse)
    words = r"cannot read .*config\.json of the run: Permission denied\."
    with pytest.raises(UserError, match=words):
        folder.holds_run(tmp_path)


def test_the_first_free_name_is_taken(tmp_path):
    for n in (1, 2, 4):
        (tmp_path / f"demo-{n}").mkdir()
    assert folder.unused(tmp_path, "demo") == tmp_path / "demo-3"
