"""Results kept in an SQLite file as they come, so that a run that is killed goes on where it was."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pars_fast.errors import DataError


class SqliteStore:
    """The file and its errors; a subclass gives its methods their rows.

    Args:
        schema: creates the table if there is none.
        content: what is kept, in words.
    Raises: DataError: if the file is something else, or cannot be written.
    """

    def __init__(self, path: Path, schema: str, content: str) -> None:
        self._path = path
        with self._named(f"not a file of {content}"):
            self._connection = sqlite3.connect(path)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(schema)

    @contextmanager
    def _named(self, trouble: str) -> Iterator[None]:
        """An error of SQLite's becomes one that names the file and says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(
                f"{self._path}: {trouble} ({error}); give another --out, or mend that file"
            ) from error

    def close(self) -> None:
        self._connection.close()
