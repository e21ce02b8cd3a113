"""A checkpoint folder in the published layout: config.json beside safetensors.  SPEC CKPT-6.

Either one file, model.safetensors, or shards named by model.safetensors.index.json.  Opening reads headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from refimpl.checkpoint.safetensors import TensorFile, open_file
from refimpl.checkpoint.weights import FolderWeights
from refimpl.config.jsonfile import read_object
from refimpl.config.model import ModelConfig
from refimpl.config.rules import show
from refimpl.errors import Invalid, Missing, Unreadable

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 1 << 26  # bytes; V3's index with 91,991 names has about 9 MB


def open_folder(path: str | PathLike[str]) -> tuple[ModelConfig, FolderWeights]:
    """The configuration and the weights, of which only headers have been read (see `weights.check`).

    Raises Unreadable, Missing (a file or a tensor of the index), Invalid, Unsupported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise Unreadable(
            f"{folder} is not a folder, but a checkpoint must be a folder with {CONFIG} and safetensors."
        )
    config = ModelConfig.from_json(folder / CONFIG)
    if (folder / SINGLE).exists():
        file = open_file(folder / SINGLE)
        return config, FolderWeights(config, dict.fromkeys(file, file))
    if not (folder / INDEX).exists():
        raise Missing(f"{folder} has no weights, but it must have {SINGLE} or {INDEX}.")
    return config, FolderWeights(config, _open_shards(folder))


def _open_shards(folder: Path) -> dict[str, TensorFile]:
    index = folder / INDEX
    weight_map = _weight_map(index)
    shards: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        shards[shard] = open_file(_inside(folder, shard))
    owner: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file:
            if name in owner:
                raise Invalid(
                    f"tensor {name} is in {owner[name]} and in {shard}, but it must be in one of them only."
                )
            owner[name] = shard
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            found = f"in {owner[name]}" if name in owner else "not there"
            raise Missing(f"tensor {name} is {found}, but by {index} it must be in {shard}.")
    return {name: shards[shard] for name, shard in owner.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map: Any = read_object(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Invalid(
            f"{index} has a weight_map of {show(weight_map)}, but it must be an object of file names."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise Invalid(f"{index} places {name[:80]} in {show(shard)}, but it must be a safetensors file.")
    return weight_map


def _inside(folder: Path, shard: str) -> Path:
    """The path of a shard.  Raises Invalid if the index leads out of its folder, Missing, Unreadable."""
    if any(mark in shard for mark in ("/", "\\", "\0", ":")):
        raise Invalid(
            f"{folder / INDEX} names the file {show(shard)}, but it must name files of its own folder."
        )
    path = folder / shard
    try:
        if not path.exists():
            raise Missing(f"{path} is missing, but {INDEX} must name files that are there.")
        target, home = path.resolve(), folder.resolve()
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read ({error.strerror}), but it must be a safetensors file."
        ) from None
    homes = [home]
    if home.parent.name == "snapshots":  # the hub's cache links every file to a folder of blobs beside it
        homes.append(home.parent.parent / "blobs")
    if target.parent not in homes:
        raise Invalid(f"{path} is a link to {target}, but it must stay in its folder.")
    return path
