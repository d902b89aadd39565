"""The files of a Debian package: by apt-get, or of a file that the user gives. dpkg-deb unpacks it; nothing is installed."""

import pathlib
import subprocess
import tarfile
import tempfile
from collections.abc import Container, Iterator, Mapping
from typing import IO

from grain_jax.core import errors, regular_file

_MINUTES = 10  # that a download may take
_MOST = 2**28  # bytes of a package, and of its files; the larger of the two has 80 MB
_MEMBERS = 100_000  # files of a package


class PackageError(errors.UserError):
    """A package cannot be had or read; the message is one line."""


class _Bounded:
    """A file for tarfile that ends in an error after _MOST bytes: no header says what a stream unpacks to."""

    def __init__(self, file: IO[bytes]):
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
    own = f"the package {name} (`apt-get download {name}` on a Debian machine makes it)"
    with tempfile.TemporaryDirectory() as folder:
        deb = pathlib.Path(folder, "package")
        if given is None:
            deb = _downloaded(name, pathlib.Path(folder), f"give its file with --deb FILE, {own}")
        else:
            deb.write_bytes(regular_file.read(given, _MOST, own))
        source = given or deb.name
        try:
            found = dict(_files(deb, wanted))
        except FileNotFoundError:
            advice = "install dpkg (apt-get install dpkg, brew install dpkg)"
            raise PackageError(f"{source}: this machine has no dpkg-deb; {advice}") from None
        except Exception as error:  # tarfile raises nearly anything
            said = (str(error).splitlines() or ["is damaged"])[0].rstrip(":")
            raise PackageError(f"{source}: {said}; expected the Debian package {name}") from None
    for path, what in wanted.items():
        if path not in found:
            said = f"has no {path} ({what}); expected the Debian package {name}"
            raise PackageError(f"{source}: {said}")
    return found


def _downloaded(name: str, folder: pathlib.Path, advice: str) -> pathlib.Path:
    """The newest version that apt knows."""
    piped = dict(cwd=folder, capture_output=True, text=True, timeout=60 * _MINUTES)
    try:
        done = subprocess.run(["apt-get", "download", name], **piped)
    except FileNotFoundError:
        raise PackageError(f"{name}: this machine has no apt-get; {advice}") from None
    except subprocess.TimeoutExpired:
        raise PackageError(f"{name}: apt-get took over {_MINUTES} minutes; {advice}") from None
    made = list(folder.glob("*.deb"))
    if done.returncode or len(made) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        said = (lines or [f"status {done.returncode}"])[0]
        failed = f"apt-get download failed ({said}); `apt-get update` first, or {advice}"
        raise PackageError(f"{name}: {failed}")
    return made[0]


def _files(deb: pathlib.Path, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the wanted ones of the regular files that the package installs."""
    command, said = ["dpkg-deb", "--fsys-tarfile", deb.name], ""
    piped = dict(cwd=deb.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **piped) as process:
        stream = _Bounded(process.stdout)
        try:
            try:
                yield from _unpacked(stream, wanted)
            except tarfile.TarError as error:
                said = str(error) or "is damaged"
            while stream.read(2**16):  # what follows the end of the archive
                pass
        except BaseException:
            process.kill()
            raise
        lines = process.stderr.read().decode("utf-8", "replace").splitlines()
        if process.wait():  # which says more than that the archive ends
            said = next((x.partition("error: ")[2] for x in lines if "error: " in x), "is damaged")
    if said:
        raise PackageError(said)


def _unpacked(stream: _Bounded, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for number, entry in enumerate(archive):
            if number == _MEMBERS or not 0 <= entry.size <= _MOST:
                most = f"{_MEMBERS:,} files of {_MOST:,} bytes"
                raise PackageError(f"{entry.name}: unpacks to more than {most}")
            path = entry.name.removeprefix("./")
            if path in wanted and entry.isfile():
                yield path, archive.extractfile(entry).read()
