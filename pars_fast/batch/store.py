"""What a batch job has done so far: an SQLite file, so that a job that is killed goes on where it was."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pars_fast.sqlite_store import SqliteStore

SCHEMA = """
CREATE TABLE IF NOT EXISTS completions (
    settings TEXT NOT NULL, prompt TEXT NOT NULL, occurrence INTEGER NOT NULL,
    text TEXT NOT NULL, output_tokens INTEGER NOT NULL, finish_reason TEXT,
    PRIMARY KEY (settings, prompt, occurrence)
) WITHOUT ROWID"""


@dataclass(frozen=True, slots=True)
class Completion:
    """`finish_reason` is vLLM's: `stop`, or `length` for an answer that was cut."""

    text: str
    output_tokens: int
    finish_reason: str | None


class CompletionStore(SqliteStore):
    """Completions of a list of prompts under some settings; each is committed as it comes.

    Rows are known by the prompt itself, and a prompt that occurs several times by which time it is: so the
    input may be extended or put in another order between runs. Completions under other settings are kept and
    not used.

    Raises: DataError: if the file is something else, or cannot be read or written; so does each method.
    """

    def __init__(self, path: Path, settings: str, prompts: Sequence[str]) -> None:
        seen: Counter[str] = Counter()
        self._keys: list[tuple[str, str, int]] = []
        for prompt in prompts:
            self._keys.append((settings, prompt, seen[prompt]))
            seen[prompt] += 1
        self._prompts = prompts
        super().__init__(path, SCHEMA, "completions")

    def add(self, number: int, completion: Completion) -> None:
        """Keep the completion of prompt `number`."""
        row = (*self._keys[number], completion.text, completion.output_tokens, completion.finish_reason)
        with self._named("the completion cannot be kept"), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO completions VALUES (?, ?, ?, ?, ?, ?)", row)

    def get(self, number: int) -> Completion | None:
        query = (
            "SELECT text, output_tokens, finish_reason FROM completions "
            "WHERE settings = ? AND prompt = ? AND occurrence = ?"
        )
        with self._named("cannot be read"):
            row = self._connection.execute(query, self._keys[number]).fetchone()
        return None if row is None else Completion(*row)

    def missing(self) -> list[int]:
        """Numbers of the prompts without a completion."""
        return [number for number in range(len(self._keys)) if self.get(number) is None]

    def export(self, path: Path) -> None:
        """Write JSON lines in the order of the input, in one step; all completions must be there."""
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            for number, prompt in enumerate(self._prompts):
                completion = self.get(number)
                assert completion is not None
                file.write(json.dumps({"prompt": prompt, **asdict(completion)}) + "\n")
        fresh.replace(path)
