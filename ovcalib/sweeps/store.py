"""Calibration sets that several sweeps and machines share, by their keys: a folder, or what fsspec opens.

    STORE/<key>.tar    the files of a set, in one object, so that it is there whole or not at all

A key is a hash of all that a set depends on, ovcalib's version among it, so a set that is there is never made again.
"""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ovcalib.calibration.sets import read_set
from ovcalib.errors import DataError, UsageError, excerpt, require
from ovcalib.rundir import RunDir, write_atomically


class SetStore:
    """The sets under a reference such as /mnt/sets, s3://bucket/sets or gs://bucket/sets.

    raises   UsageError where it cannot be opened
    """

    def __init__(self, reference: str) -> None:
        if not reference.strip():
            raise UsageError("`store` is empty. Expected a folder, or an address such as s3://bucket/sets.")
        fsspec = require("fsspec", "quantize", f"`store={reference}`")
        self.reference = reference
        with self._reached():
            self.files, self.root = fsspec.core.url_to_fs(reference)
            self.local = isinstance(self.files, fsspec.implementations.local.LocalFileSystem)
            if self.files.isfile(self.root):
                raise NotADirectoryError("a file has that name")

    def prepare(self) -> str:
        """Make the folder where there is none; returns an address that does not depend on the current folder.

        raises   UsageError where it cannot be made
        """
        with self._reached():
            self.files.makedirs(self.root, exist_ok=True)
            return str(self.files.unstrip_protocol(self.root))

    def holds(self, key: str) -> bool:
        """Whether there is a set under a key, readable or not. Raises UsageError where the store cannot be reached."""
        with self._reached():
            return bool(self.files.exists(self._object(key)))

    def fetch(self, key: str, target: Path) -> bool:
        """Write the set of a key into a new folder; False where there is none, or none that can be read.

        raises   UsageError where the store cannot be reached, or the folder not be written
        """
        if not self.holds(key):
            return False
        with RunDir(target) as work:
            archive = work.path / ".tar"
            with self._reached():
                self.files.get_file(self._object(key), str(archive))
            try:
                with tarfile.open(archive, "r:") as packed:
                    packed.extractall(work.path, filter="data")
                read_set(work.path)
            except (tarfile.TarError, DataError):
                return False
            archive.unlink()
            work.finish()
            return True

    def publish(self, key: str, folder: Path) -> None:
        """Put the set in a folder under a key, in place of one that is there.

        raises   UsageError where the store cannot be reached or written
        """
        with tempfile.TemporaryDirectory() as temporary:
            archive = Path(temporary) / "set.tar"
            with tarfile.open(archive, "w") as packed:
                for file in sorted(folder.iterdir()):
                    packed.add(file, file.name)
            with self._reached():
                if self.local:
                    write_atomically(Path(self._object(key)), lambda partial: shutil.copyfile(archive, partial))
                else:
                    self.files.put_file(str(archive), self._object(key))

    def _object(self, key: str) -> str:
        return f"{self.root}/{key}.tar"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every kind of store has errors of its own
            raise UsageError(
                f"The store {self.reference!r} cannot be used ({type(error).__name__}: {excerpt(error)}). Expected a "
                "folder, or an address that fsspec opens with the credentials that are set here, such as "
                "s3://bucket/sets; leave `store` out to do without."
            ) from error
