"""Weights by their names in the published checkpoint, wherever they are.  SPEC CKPT."""

from refimpl.checkpoint.dtypes import Stored
from refimpl.checkpoint.folder import open_folder
from refimpl.checkpoint.names import ParameterSpec, aliases, parameters, trainable
from refimpl.checkpoint.safetensors import open_file, write
from refimpl.checkpoint.virtual import VirtualWeights
from refimpl.checkpoint.weights import DictWeights, FolderWeights, Weights, check

__all__ = [
    "DictWeights",
    "FolderWeights",
    "ParameterSpec",
    "Stored",
    "VirtualWeights",
    "Weights",
    "aliases",
    "check",
    "open_file",
    "open_folder",
    "parameters",
    "trainable",
    "write",
]
