"""Sources that are files with many images inside."""

import posixpath
from collections.abc import Iterator, Sequence

import fsspec

from pipeline.data.listing import Source
from pipeline.data.remote import version
from pipeline.redaction import bare


class Files(Source):
    """One or more files of one kind. Keys begin with the name of the file they are in where there are several."""

    def __init__(self, address: str, files: fsspec.AbstractFileSystem, paths: Sequence[str]) -> None:
        super().__init__(address)
        self.files, self.paths = files, sorted(paths)
        plain = [bare(path) for path in self.paths]
        folder = posixpath.commonpath([posixpath.dirname(path) for path in plain])
        self.names = [posixpath.relpath(path, folder) if folder else path for path in plain]

    def identity(self) -> Iterator[str]:
        for path, name in zip(self.paths, self.names):
            info = self.files.info(path)
            yield f"{name} {info.get('size')} {version(info)}"
