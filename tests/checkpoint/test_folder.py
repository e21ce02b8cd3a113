"""Checkpoint folders, sound and malformed.  SPEC CKPT-6."""

import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes  # noqa: F401 - without it NumPy has no bfloat16 for the library
import numpy as np
import pytest
import safetensors.numpy

from refimpl.checkpoint import Stored, VirtualWeights, check, open_folder, write
from refimpl.config import preset
from refimpl.errors import Invalid, Missing, Unreadable

MODELS = Path(__file__).parent.parent / "recordings" / "models"
# the library has no FP8 for NumPy; test_fp8 reads that recording
RECORDINGS = sorted(
    path.parent for path in MODELS.glob("*/model.safetensors") if path.parent.name != "H01_fp8"
)
CONFIG = preset("tiny-v3-noq")
VIRTUAL = VirtualWeights(CONFIG, seed=5)
STORED = {name: Stored(VIRTUAL.dtype(name), VIRTUAL.shape(name), VIRTUAL.codes(name)) for name in VIRTUAL}
NAMES = list(STORED)
SHARDS = {"model-00001-of-00002.safetensors": NAMES[:30], "model-00002-of-00002.safetensors": NAMES[30:]}


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    for shard, names in SHARDS.items():
        write(folder / shard, {name: STORED[name] for name in names})
    write_index(folder, {name: shard for shard, names in SHARDS.items() for name in names})
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def change_index(folder, changes):
    path = folder / "model.safetensors.index.json"
    write_index(folder, json.loads(path.read_text())["weight_map"] | changes)


def test_shards_give_every_tensor_bit_for_bit(folder):
    config, weights = open_folder(folder)
    check(weights, values=True)
    assert config == CONFIG
    assert list(weights) == NAMES
    for name in NAMES:
        assert np.array_equal(weights[name], VIRTUAL[name])
        assert np.array_equal(weights.codes(name), VIRTUAL.codes(name))
        assert np.array_equal(weights.slice(name, 3, 5), VIRTUAL.slice(name, 3, 5))


@pytest.mark.parametrize("recorded", RECORDINGS, ids=lambda path: path.name)
def test_a_recorded_checkpoint_is_complete_and_reads_as_the_library_reads_it(recorded):
    _, weights = open_folder(recorded)
    check(weights, values=True)
    assert not weights.unknown
    theirs = safetensors.numpy.load_file(recorded / "model.safetensors")
    assert {*weights, *weights.stored_copies} == set(theirs)
    for name, array in theirs.items():
        assert np.array_equal(weights[name], array.astype(weights[name].dtype))


def test_a_single_file_is_the_same(folder):
    write(folder / "model.safetensors", STORED)
    _, weights = open_folder(str(folder))
    assert list(weights) == NAMES
    assert np.array_equal(weights[NAMES[3]], VIRTUAL[NAMES[3]])


def test_opening_reads_headers_only(folder):
    write(folder / "model.safetensors", {"extra": np.zeros(1 << 22)} | STORED)
    open_folder(folder)  # what is made once for a configuration
    tracemalloc.start()
    open_folder(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_values_that_are_not_finite_are_found_at_the_first_reading(folder):
    array = VIRTUAL["model.norm.weight"].copy()
    array[7] = np.nan
    write(folder / "model.safetensors", STORED | {"model.norm.weight": array})
    _, weights = open_folder(folder)
    check(weights)
    for use in (lambda: weights["model.norm.weight"], lambda: check(weights, values=True)):
        with pytest.raises(
            Invalid, match=r"tensor model\.norm\.weight has nan at 7, but all values must be finite"
        ):
            use()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "\0.safetensors",
    ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, name):
    write(folder.parent / "x.safetensors", {NAMES[0]: STORED[NAMES[0]]})
    change_index(folder, {NAMES[0]: name})
    with pytest.raises(Invalid, match="must name files of its own folder"):
        open_folder(folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(folder):
    write(folder.parent / "x.safetensors", {NAMES[0]: STORED[NAMES[0]]})
    os.symlink("../x.safetensors", folder / "x.safetensors")
    change_index(folder, {NAMES[0]: "x.safetensors"})
    with pytest.raises(Invalid, match=r"is a link to .*, but it must stay in its folder"):
        open_folder(folder)


def test_the_links_of_the_hubs_cache_are_followed(folder):
    cache = folder.parent / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder = folder.rename(cache / "snapshots" / "0123abcd")
    for shard in SHARDS:
        (folder / shard).rename(cache / "blobs" / shard[:11])
        os.symlink(f"../../blobs/{shard[:11]}", folder / shard)
    assert list(open_folder(folder)[1]) == NAMES


@pytest.mark.parametrize("value", [3, None, ["x.safetensors"], "x.bin"])
def test_an_index_that_names_no_safetensors_file_is_refused(folder, value):
    change_index(folder, {NAMES[0]: value})
    with pytest.raises(Invalid, match="must be a safetensors file"):
        open_folder(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    write_index(folder, weight_map)
    with pytest.raises(Invalid, match="weight_map"):
        open_folder(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Missing, match=r"model-00002-of-00002\.safetensors is missing"):
        open_folder(folder)


def test_a_tensor_that_is_not_in_its_shard_is_named(folder):
    change_index(folder, {"extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(Missing, match=r"tensor extra is not there, but by .* it must be in model-00001"):
        open_folder(folder)
    change_index(
        folder, {"extra": "model-00001-of-00002.safetensors", NAMES[0]: "model-00002-of-00002.safetensors"}
    )
    with pytest.raises(Missing, match=r"is in model-00001-of-00002.safetensors, but by"):
        open_folder(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    names = [*SHARDS["model-00002-of-00002.safetensors"], NAMES[0]]
    write(folder / "model-00002-of-00002.safetensors", {name: STORED[name] for name in names})
    with pytest.raises(Invalid, match=r"is in model-00001.* and in model-00002.*, but it must be in one"):
        open_folder(folder)


def test_a_tensor_that_the_index_forgot_is_there(folder):
    write(
        folder / "model-00001-of-00002.safetensors",
        {n: STORED[n] for n in NAMES[:30]} | {"extra": np.zeros(1)},
    )
    assert open_folder(folder)[1].unknown == ("extra",)


def test_a_truncated_shard_is_unreadable(folder):
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Unreadable, match="by its header it must have"):
        open_folder(folder)


def test_what_is_no_checkpoint_folder_is_refused(folder):
    with pytest.raises(Unreadable, match="is not a folder"):
        open_folder(folder / "config.json")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(Missing, match="has no weights"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(Unreadable, match=r"config\.json cannot be read"):
        open_folder(folder)
