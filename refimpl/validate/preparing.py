"""Whole cases for a port, from compact ones.  SPEC CASE-3, VERDICT-15.

The committed folders leave out inputs that the generator makes and weights that cases share.  What a folder
lacks is made here, as `golden generate` writes it, without expected values, which are not a port's to see.
"""

from __future__ import annotations

import threading
from pathlib import Path

from refimpl.cases import folder as folders
from refimpl.cases.folder import Folder
from refimpl.cases.format import CASE, INPUTS, Tensor
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.atomic import write_bytes
from refimpl.checkpoint.dtypes import Stored
from refimpl.errors import Unreadable

_ASSETS = threading.Lock()  # so that two threads do not make the same asset


def whole(folder: Folder) -> bool:
    """Whether every input and weight is in the folder, or in an asset beside it."""
    return all(
        t.name in folder.inputs or (t.asset and _asset(folder.path.parent.parent, t.asset).is_file())
        for t in folder.case.tensors
        if t.given
    )


def prepared(folder: Folder, target: Path) -> Path:
    """The folder if it is whole, else a whole one at `target`, which is <root>/<suite>/<case>.  Raises
    Unreadable."""
    if whole(folder):
        return folder.path
    root = target.parent.parent
    own = {t.name: _stored(folder, t) for t in folder.case.tensors if t.given and not t.asset}
    shared = [t for t in folder.case.tensors if t.given and t.asset]
    try:
        target.mkdir(parents=True, exist_ok=True)
        text = (folder.path / CASE).read_bytes()
    except OSError as error:
        raise Unreadable(f"{target} cannot be made ({error.strerror}).") from None
    with _ASSETS:
        for name in {t.asset for t in shared if t.asset}:
            if not _asset(root, name).is_file():
                folders.write_asset(
                    root, name, {t.name: _stored(folder, t) for t in shared if t.asset == name}
                )
    safetensors.write(target / INPUTS, own)
    write_bytes(target / CASE, text)
    return target


def _asset(root: Path, name: str) -> Path:
    return root / "assets" / f"{name}.safetensors"


def _stored(folder: Folder, t: Tensor) -> Stored:
    if folder.case.by_bits:
        return folders.stored(folder.given_codes(t), t.dtype)
    return folders.stored(folder.given(t), t.dtype)
