"""The files of a Debian package: by apt-get, or of a file that the user gives; nothing is installed.

A package (deb(5)) is an `ar` archive of debian-binary, control.tar.* and data.tar.*.
"""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import tempfile
from collections.abc import Container, Iterator, Mapping
from typing import BinaryIO

from etils import epath

from grain_jax import errors
from grain_jax.files import regular_file

_MAGIC = b"!<arch>\n"
_HEADER = (
    60  # bytes of a member's header: name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
)
_MINUTES = 10  # that a download may take
_MOST = 2**28  # bytes of a package, and of its files; the larger of the two has 80 MB
_MEMBERS = 100_000  # files of a package
_READERS = {"": lambda file: file, ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


class PackageError(errors.UserError):
    """A package cannot be had or read; the message is one line."""


class _Bounded:
    """A file for tarfile that ends in an error after _MOST bytes: no header says what a stream unpacks to."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, _MOST

    def read(self, size: int) -> bytes:
        out = self._file.read(size)
        self._left -= len(out)
        if self._left < 0:
            raise PackageError(f"unpacks to over {_MOST:,} bytes")
        return out


def read(name: str, given: str | None, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Files of a package.

    Args:
      name: of the Debian package.
      given: its file; None: apt-get downloads it.
      wanted: path in the package -> what it is, for the error.

    Returns: path in the package -> content.

    Raises:
      PackageError: no package, no such file in it, or it unpacks to too much.
      regular_file.FileError: `given` cannot be read.
    """
    if given is None:
        content, source = _download(name)
    else:
        source = given
        expected = f"the package {name} (`apt-get download {name}` on a Debian machine makes it)"
        content = regular_file.read(given, _MOST, expected)
    try:
        found = dict(_files(content, wanted))
    except Exception as error:  # tarfile and what decompresses raise nearly anything
        said = (str(error).splitlines() or ["is damaged"])[0].rstrip(":")
        raise PackageError(f"{source}: {said}; expected the Debian package {name}") from None
    for path, what in wanted.items():
        if path not in found:
            raise PackageError(
                f"{source}: has no {path} ({what}); expected the Debian package {name}"
            )
    return found


def _download(name: str) -> tuple[bytes, str]:
    """(content, file name) of the newest version that apt knows."""
    advice = (
        f"give its file with --deb FILE (`apt-get download {name}` on a Debian machine makes it)"
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                ["apt-get", "download", name],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=60 * _MINUTES,
                check=False,
            )
        except FileNotFoundError:
            raise PackageError(f"{name}: this machine has no apt-get; {advice}") from None
        except subprocess.TimeoutExpired:
            raise PackageError(f"{name}: apt-get took over {_MINUTES} minutes; {advice}") from None
        made = list(epath.Path(folder).glob("*.deb"))
        if done.returncode or len(made) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            said = lines[0] if lines else f"status {done.returncode}"
            raise PackageError(
                f"{name}: apt-get download failed ({said}); `apt-get update` first, or {advice}"
            )
        return made[0].read_bytes(), made[0].name


def _files(content: bytes, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the wanted ones of the regular files that the package installs."""
    for name, member in _members(content):
        if not name.startswith("data.tar"):
            continue
        reader = _READERS.get(name.removeprefix("data.tar"))
        if reader is None:
            raise PackageError(
                f"has {name}, which Python cannot read; repack it with `dpkg-deb -R` and `dpkg-deb -Zxz -b`"
            )
        stream = _Bounded(reader(io.BytesIO(member)))
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for number, entry in enumerate(archive):
                if number == _MEMBERS or not 0 <= entry.size <= _MOST:
                    most = f"{_MEMBERS:,} files of {_MOST:,} bytes"
                    raise PackageError(f"{entry.name}: unpacks to more than {most}")
                path = entry.name.removeprefix("./")
                if path in wanted and entry.isfile():
                    yield path, archive.extractfile(entry).read()


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    if not content.startswith(_MAGIC):
        raise PackageError("is no Debian package, a .deb file")
    at = len(_MAGIC)
    while at + _HEADER <= len(content):
        header = content[at : at + _HEADER]
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58]
        if not size.strip().isdigit() or at + _HEADER + int(size) > len(content):
            raise PackageError(f"is damaged or cut off at byte {at}")
        at += _HEADER
        yield name, content[at : at + int(size)]
        at += int(size) + int(size) % 2
