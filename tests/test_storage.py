"""Arrays and their record on disk: whole or not at all, and verified part by part."""

import dataclasses
import json

import numpy as np
import pytest

from flax_lstm.leaves import digest, to_save
from flax_lstm.manifest import DamagedCheckpointError
from flax_lstm.storage import RECORD, Storage, with_digests


@pytest.fixture
def storage():
    storage = Storage()
    yield storage
    storage.close()


STATE = {
    "kernel": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32),
    "none": np.zeros((0, 4), np.float32),
    "step": np.int32(3),
}


def test_arrays_come_back_with_their_record(tmp_path, storage):
    arrays, leaves = to_save(STATE)
    leaves = with_digests(arrays, leaves)
    storage.write(tmp_path / "1", arrays, {"said": [1, None]})
    got = storage.read(tmp_path / "1", leaves)
    assert got.keys() == STATE.keys()
    for name, array in STATE.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got[name], array)
    assert json.loads((tmp_path / "1" / RECORD).read_text()) == {"said": [1, None]}


TOP = digest(STATE["kernel"][:20])
OTHER_DIGEST = "the SHA-256 of kernel"
OTHER_FORM = "its arrays have other shapes or dtypes.*kernel"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sha256="0" * 64), OTHER_DIGEST),
        (dict(sha256={"0:20,0:6": TOP, "20:40,0:6": "0" * 64}), OTHER_DIGEST),
        (dict(sha256={"0:20,0:6": TOP}), OTHER_DIGEST),
        (dict(dtype="int32"), OTHER_FORM),
        (dict(shape=(6, 40)), OTHER_FORM),
    ],
    ids=["digest", "digest of a part", "part not digested", "dtype", "shape"],
)
def test_what_the_record_does_not_tell_of_is_damaged(tmp_path, storage, change, words):
    arrays, leaves = to_save(STATE)
    leaves = with_digests(arrays, leaves)
    storage.write(tmp_path / "1", arrays, {})
    leaves["kernel"] = dataclasses.replace(leaves["kernel"], **change)
    with pytest.raises(DamagedCheckpointError, match=rf"1 is damaged: .*{words}"):
        storage.read(tmp_path / "1", leaves)


def test_a_digest_of_each_part_does_for_the_whole(tmp_path, storage):
    arrays, leaves = to_save(STATE)
    leaves = with_digests(arrays, leaves)
    storage.write(tmp_path / "1", arrays, {})
    kernel = STATE["kernel"]
    parts = {"0:20,0:6": digest(kernel[:20]), "20:40,0:6": digest(kernel[20:])}
    leaves["kernel"] = dataclasses.replace(leaves["kernel"], sha256=parts)
    got = storage.read(tmp_path / "1", leaves)
    np.testing.assert_array_equal(got["kernel"], kernel)
