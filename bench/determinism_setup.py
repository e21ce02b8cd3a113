"""Other environments for bench/determinism.py, made once and kept in a cache folder.

`other_numpy`  a virtual environment of this Python with another NumPy, by pip.
`aarch64`      Debian's arm64 Python under qemu-user with the aarch64 wheels of NumPy and SciPy.  Nothing is
               installed: packages are downloaded with a package state of their own and unpacked.  Needs
               apt-get and dpkg (Debian, Ubuntu) and the network, the first time, but no root.

Both raise CalledProcessError or OSError when something is missing.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

RELEASE = "bookworm"  # Debian 12: Python 3.11
PYTHON = "python3.11"
PACKAGES = (
    *("libbz2-1.0", "libc6", "libcrypt1", "libexpat1", "libffi8", "libgcc-s1", "liblzma5", "libssl3"),
    *(
        "libstdc++6",
        "libuuid1",
        "zlib1g",
        "python3.11-minimal",
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
    ),
)
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RUNTIME = ("tabulate", "tqdm")  # what refimpl imports beside NumPy and SciPy


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(c) for c in command], cwd=cwd, check=True, capture_output=True, text=True)


def finished(folder: Path) -> bool:
    """Whether the folder was made completely by an earlier run; a half-made one is removed."""
    if (folder / "finished").exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return False


def oldest_numpy() -> str:
    """The oldest NumPy 2 that has a wheel for this Python."""
    return {11: "2.0.2", 12: "2.0.2", 13: "2.1.3"}.get(sys.version_info[1], "2.3.5")


def other_numpy(cache: Path, version: str) -> list[str]:
    """The command of a Python with that NumPy."""
    folder = cache / f"numpy-{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    python = folder / "bin" / "python"
    if not finished(folder):
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "-q", f"numpy=={version}", "scipy", *RUNTIME)
        (folder / "finished").touch()
    return [str(python)]


def aarch64(cache: Path) -> tuple[list[str], dict[str, str]]:
    """The command of an emulated aarch64 Python, and the variables that it needs."""
    folder = cache / f"aarch64-{RELEASE}"
    root, site = folder / "root", folder / "site"
    if not finished(folder):
        _packages(folder, "arm64", PACKAGES, root)
        _wheels(folder, site)
        if _qemu(folder) is None:
            _packages(folder, "amd64", ["qemu-user-static"], folder / "qemu")
        (folder / "finished").touch()
    qemu = _qemu(folder)
    if qemu is None:
        raise FileNotFoundError("qemu-aarch64-static was not found and could not be downloaded")
    command = [qemu, "-L", str(root), str(root / "usr" / "bin" / PYTHON)]
    return command, {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(site)}


def _qemu(folder: Path) -> str | None:
    for name in ("qemu-aarch64-static", "qemu-aarch64", str(folder / "qemu/usr/bin/qemu-aarch64-static")):
        if found := shutil.which(name):
            return found
    return None


def _packages(folder: Path, architecture: str, names: Sequence[str], into: Path) -> None:
    """Download Debian packages of an architecture and unpack them, apart from the system's own packages."""
    private = folder / f"apt-{architecture}"
    for part in ("state/lists/partial", "cache/archives/partial", "debs"):
        (private / part).mkdir(parents=True)
    sources = private / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {MIRROR} {RELEASE} main\n")
    apt = [
        *("apt-get", "-qq"),
        *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures::={architecture}"),
        *("-o", f"Dir::State={private / 'state'}", "-o", "Dir::State::status=/dev/null"),
        *("-o", f"Dir::Cache={private / 'cache'}"),
        *("-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"),
    ]
    if os.geteuid() == 0:  # else apt's own user could not write into the cache folder
        apt += ["-o", "APT::Sandbox::User=root"]
    run(*apt, "update")
    run(*apt, "download", *names, cwd=private / "debs")
    for deb in (private / "debs").glob("*.deb"):
        run("dpkg", "-x", deb, into)
    shutil.rmtree(private)


def _wheels(folder: Path, site: Path) -> None:
    """Unpack the aarch64 wheels; wheels without compiled code are taken as they are."""
    wheels = folder / "wheels"
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", wheels),
        *("--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=none", *platforms),
        *("numpy", "scipy", *RUNTIME),
    )
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)
