"""The files of a Debian package: by apt-get, or of a file that the user gives; nothing is installed.

A package (deb(5)) is an `ar` archive of debian-binary, control.tar.* and data.tar.*.
"""

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping

from etils import epath

from grain_jax import errors

_MAGIC = b"!<arch>\n"
_HEADER = (
    60  # bytes of a member's header: name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
)
_MINUTES = 10  # that a download may take
_LARGEST = 2**28  # bytes of a file in a package


class PackageError(errors.UserError):
    """A package cannot be had or read; the message is one line."""


def read(name: str, given: str | None, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Files of a package.

    Args:
      name: of the Debian package.
      given: its file; None: apt-get downloads it.
      wanted: path in the package, or a folder that ends with "/" -> what it is, for the error.

    Returns: path in the package -> content; of a folder, all files in it.

    Raises:
      PackageError: no package, no such file in it.
    """
    if given is None:
        content, source = _download(name)
    else:
        source = given
        try:
            content = epath.Path(given).read_bytes()
        except OSError as error:
            raise PackageError(
                f"--deb {given}: {error.strerror or error}; expected the file of the package {name}"
                f" (`apt-get download {name}` on a Debian machine makes it)"
            ) from None
    folders = tuple(path for path in wanted if path.endswith("/"))
    try:
        found = {
            path: data
            for path, data in _files(content, source)
            if path in wanted or (folders and path.startswith(folders))
        }
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, PackageError):
            raise
        said = (str(error).splitlines() or ["is damaged"])[0].rstrip(":")
        raise PackageError(f"{source}: {said}; expected the Debian package {name}") from None
    for path, what in wanted.items():
        if not any(one == path or (path in folders and one.startswith(path)) for one in found):
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


def _files(content: bytes, source: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the regular files that the package installs."""
    for name, member in _members(content, source):
        if not name.startswith("data.tar"):
            continue
        if name.endswith(".zst"):
            raise PackageError(
                f"{source}: is compressed by zstd, which Python cannot read; repack it with"
                " `dpkg-deb -R` and `dpkg-deb -Zxz -b`"
            )
        with tarfile.open(fileobj=io.BytesIO(member), mode="r:*") as archive:
            for entry in archive:
                if entry.isfile() and entry.size <= _LARGEST:
                    file = archive.extractfile(entry)
                    if file is not None:
                        yield entry.name.removeprefix("./"), file.read()


def _members(content: bytes, source: str) -> Iterator[tuple[str, bytes]]:
    if not content.startswith(_MAGIC):
        raise PackageError(f"{source}: is no Debian package; expected a .deb file")
    at = len(_MAGIC)
    while at + _HEADER <= len(content):
        header = content[at : at + _HEADER]
        name, size = header[:16].decode("ascii", "replace").rstrip(" /"), header[48:58]
        if not size.strip().isdigit() or at + _HEADER + int(size) > len(content):
            raise PackageError(f"{source}: is damaged or cut off at byte {at}")
        at += _HEADER
        yield name, content[at : at + int(size)]
        at += int(size) + int(size) % 2
