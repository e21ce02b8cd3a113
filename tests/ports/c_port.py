"""Compiling the C port, as it is or with one file changed, and running it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "c"
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
NOT_FOR_ME = 77


def compiler() -> str | None:
    """The C compiler; None where there is none."""
    return shutil.which(os.environ.get("CC", "cc"))


@dataclass
class Build:
    """Objects that are compiled once, in a folder, with extra flags."""

    folder: Path
    flags: tuple[str, ...] = ()
    _objects: dict[str, Path] = field(default_factory=dict)

    def port(self) -> Path:
        """The port as it is."""
        return self._link("port", {path.name: self._object(path) for path in sorted(FOLDER.glob("*.c"))})

    def changed(self, name: str, file: str, source: str) -> Path:
        """The port with another text of one of its files."""
        text = self.folder / f"{name}.c"
        text.write_text(source)
        objects = {path.name: self._object(path) for path in sorted(FOLDER.glob("*.c")) if path.name != file}
        return self._link(name, objects | {file: self._compile(text)})

    def _object(self, path: Path) -> Path:
        if path.name not in self._objects:
            self._objects[path.name] = self._compile(path)
        return self._objects[path.name]

    def _compile(self, source: Path) -> Path:
        target = self.folder / f"{source.stem}.o"
        self._cc(*FLAGS, *self.flags, f"-I{FOLDER}", "-c", str(source), "-o", str(target))
        return target

    def _link(self, name: str, objects: dict[str, Path]) -> Path:
        target = self.folder / name
        self._cc(*self.flags, *(str(path) for path in objects.values()), "-lm", "-o", str(target))
        return target

    def _cc(self, *arguments: str) -> None:
        cc = compiler()
        assert cc is not None
        done = subprocess.run([cc, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def run(port: Path, case: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """One case.  The exit status is 77 when it is not for the port."""
    return subprocess.run([port, case, output], capture_output=True, text=True, timeout=60)
