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


def test_a_folder_in_which_nothing_began_goes_away(tmp_path):
    with folder.writing(tmp_path / "a" / "run"):
        assert not folder.holds_run(tmp_path / "a" / "run")
    assert not (tmp_path / "a" / "run").exists()


def test_a_json_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "x.json"
    folder.write_json(path, {"ä": [1, None]})
    assert folder.read_json(path) == {"ä": [1, None]}
    with pytest.raises(TypeError):
        folder.write_json(path, {"cannot": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*x\.json"):
        folder.read_json(path)


def test_the_first_free_name_is_taken(tmp_path):
    for n in (1, 2, 4):
        (tmp_path / f"demo-{n}").mkdir()
    assert folder.unused(tmp_path, "demo") == tmp_path / "demo-3"
