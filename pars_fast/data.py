"""Length files: one prompt a line with the length of many models' answers to it.

Format (gzip or plain JSON lines): `{"id", "split", "prompt", "output_tokens": {model: int}}`, further
fields ignored. `split` is train, val or test and comes from a hash of the prompt, so that one prompt has
the same split in every file (`split_of`).
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pars_fast.errors import DataError
from pars_fast.text import is_hashed, is_text, normalised

Split = Literal["train", "val", "test"]
CONSENSUS = "consensus"
TRAIN_PERCENT, VAL_PERCENT = 70, 15


def split_of(prompt: str) -> Split:
    """train 70, val 15, test 15 %, by a hash of the prompt, so that a prompt has one split for good."""
    digest = hashlib.sha256(normalised(prompt).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < TRAIN_PERCENT:
        return "train"
    return "val" if percent < TRAIN_PERCENT + VAL_PERCENT else "test"


@dataclass(frozen=True, slots=True)
class LengthRow:
    """One prompt. `output_tokens` maps a model's name to the length of its answer, in tokens, >= 1."""

    id: str
    split: Split
    prompt: str
    output_tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class LengthFile:
    """All rows of one file, in its order. `name` is the file name without `lengths_` and extensions."""

    name: str
    path: Path
    rows: tuple[LengthRow, ...]

    @property
    def models(self) -> list[str]:
        """Names of the model columns, in order of first appearance."""
        return list(dict.fromkeys(model for row in self.rows for model in row.output_tokens))

    def select(self, split: Split | Literal["all"]) -> "LengthFile":
        """The rows of one split; `all` keeps every row."""
        kept = self.rows if split == "all" else tuple(row for row in self.rows if row.split == split)
        return LengthFile(self.name, self.path, kept)

    def require_model(self, model: str) -> None:
        """Raises: DataError: if no row has a length for `model`; lists the columns there are."""
        if model not in self.models:
            raise DataError(f"{self.path}: no model column {model!r}; it has: {', '.join(self.models)}")


def read_length_file(path: str | Path) -> LengthFile:
    """Read and check a length file.

    Raises: DataError: if the file is missing, empty, not gzip or JSON lines, a row lacks a field or holds
        the hash of its prompt alone; names the file and the line.
    """
    path = Path(path)
    rows = tuple(_parse_row(path, number, line) for number, line in _lines(path))
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected one JSON object a line")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("lengths_")
    return LengthFile(name, path, rows)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected JSON lines, gzipped if named .gz"
        ) from error


def _parse_row(path: Path, number: int, line: str) -> LengthRow:
    def fail(reason: str) -> DataError:
        return DataError(f"{path}:{number}: {reason}")

    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise fail("expected a JSON object")
    prompt, split, lengths = record.get("prompt"), record.get("split"), record.get("output_tokens")
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise fail('"prompt" must be a non-empty string of text')
    if is_hashed(prompt):
        raise fail(
            "holds the hash of a prompt, from which nothing can be learnt or judged; record with "
            "PARS_RECORD_PROMPTS=plain"
        )
    if split not in ("train", "val", "test"):
        raise fail(f'"split" must be train, val or test, got {split!r}')
    if not isinstance(lengths, dict):
        raise fail('"output_tokens" must map model names to lengths')
    for model, length in lengths.items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise fail(f'"output_tokens" of {model!r} must be a whole number >= 1, got {length!r}')
    return LengthRow(str(record.get("id", number)), split, prompt, lengths)


def log_lengths(file: LengthFile, model: str) -> NDArray[np.float64]:
    """Natural log of one model's answer lengths, (len(rows),), NaN where the model has no answer.

    `model` may be `consensus`: the mean over models of (log length - that model's mean), put back on the
    file's scale by the mean of the model means. It is much less noisy than one sample of one model, and
    keeps the absolute level, so that labels of different files can be ordered together.

    Raises: DataError: if no row has a length for `model`, or the file has no lengths at all.
    """
    if model != CONSENSUS:
        file.require_model(model)
        lengths = (row.output_tokens.get(model) for row in file.rows)
        return np.array([math.nan if length is None else math.log(length) for length in lengths])
    if not file.models:
        raise DataError(f"{file.path}: no row has an answer length")
    columns = np.stack([log_lengths(file, name) for name in file.models])
    model_means = np.nanmean(columns, axis=1, keepdims=True)
    present = ~np.isnan(columns)
    deviations = np.where(present, columns - model_means, 0.0)
    with np.errstate(invalid="ignore"):
        label: NDArray[np.float64] = deviations.sum(axis=0) / present.sum(axis=0) + model_means.mean()
    return label


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """Prompts of one split of several files with one label each.

    `log_length` is (n,) float64; `group` is (n,) int64, the index of the file a prompt came from.
    """

    prompts: list[str]
    log_length: NDArray[np.float64]
    group: NDArray[np.int64]

    def at_most(self, per_group: int | None, seed: int) -> "LabelledPrompts":
        """A seeded sample of at most `per_group` prompts of each file; None keeps all."""
        if per_group is None:
            return self
        shuffled = np.random.default_rng(seed).permutation(len(self.prompts))
        groups = np.unique(self.group)
        kept = np.sort(
            np.concatenate([shuffled[self.group[shuffled] == group][:per_group] for group in groups])
        )
        return LabelledPrompts([self.prompts[i] for i in kept], self.log_length[kept], self.group[kept])


def distinct_prompts(files: Sequence[LengthFile], *splits: Split) -> set[str]:
    """The prompts of some splits, as `normalised` has them; of all splits if none is named."""
    return {
        normalised(row.prompt) for file in files for row in file.rows if not splits or row.split in splits
    }


def label_prompts(
    files: Sequence[LengthFile], split: Split, model: str, *, forbidden: Set[str] = frozenset()
) -> LabelledPrompts:
    """Prompts of `split` with their label; rows without one, or with a prompt that is `normalised` to one
    of `forbidden`, are left out.

    Raises: DataError: if nothing is left, or a file has no column `model`.
    """
    prompts: list[str] = []
    labels: list[float] = []
    group: list[int] = []
    for index, file in enumerate(files):
        for row, label in zip(file.rows, log_lengths(file, model), strict=True):
            if row.split == split and not math.isnan(label) and normalised(row.prompt) not in forbidden:
                prompts.append(row.prompt)
                labels.append(float(label))
                group.append(index)
    if not prompts:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"no {split} prompts with a length of {model!r} in {names}")
    return LabelledPrompts(prompts, np.array(labels), np.array(group))


def split_prompts(
    files: Sequence[LengthFile], model: str, exclude: Sequence[LengthFile] = ()
) -> tuple[LabelledPrompts, LabelledPrompts]:
    """(train, validation) prompts of all files; none crosses splits, none stands in a file of `exclude`.

    A prompt that some file holds out (test before validation) is held out of all of them.

    Raises: DataError: as `label_prompts`.
    """
    forbidden = distinct_prompts(exclude) | distinct_prompts(files, "test")
    validation = label_prompts(files, "val", model, forbidden=forbidden)
    training = label_prompts(files, "train", model, forbidden=forbidden | distinct_prompts(files, "val"))
    return training, validation
