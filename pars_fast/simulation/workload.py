"""What arrives: requests with real lengths, at real or Poisson times, scored well or badly.

Load is offered tokens/s over the closed-loop FCFS tokens/s of the same mix (`docs/design.md`). Everything is
a pure function of its input and a seed.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pars_fast.data import LengthFile
from pars_fast.errors import DataError

MAX_TOKENS = 10_000_000  # a longer prompt or answer is a damaged file
CHARS_PER_TOKEN = 4  # for the prompts of a length file, which have no token count there
_TAU_SAMPLE = 50_000  # requests on which the noise is calibrated
HASHED_TOKENS = 512  # of a prompt, for each of its `hash_ids`
_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_OPTIONAL = ("score", "app")
_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class Workload:
    """N requests, ascending by arrival.

    Attributes:
        name: of the trace or length file.
        arrival_s: (N,) float64, >= 0.
        prompt_tokens, output_tokens: (N,) int64, >= 1.
        expected_tokens: (N,) float64, what a ranker expects of each answer; NaN = not scored.
        app: (N,) str, the application of each request, as `type/number` or without a type; "" for a request
            that is its own; None if no request names one.
        hash_ids: of each request, what names its prompt's blocks of `HASHED_TOKENS` tokens, the last one
            maybe shorter: prompts are alike as far as their ids are. None if no two prompts share a prefix.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    expected_tokens: NDArray[np.float64]
    app: NDArray[np.str_] | None = None
    hash_ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        columns: list[NDArray[Any]] = [
            self.arrival_s, self.prompt_tokens, self.output_tokens, self.expected_tokens
        ]
        if self.app is not None:
            columns.append(self.app)
        if not count or any(column.shape != (count,) for column in columns):
            raise DataError(f"{self.name}: a workload needs at least one request and columns of one length")
        if self.arrival_s[0] < 0 or (np.diff(self.arrival_s) < 0).any():
            raise DataError(f"{self.name}: arrivals must ascend from 0 or later")
        if min(self.prompt_tokens.min(), self.output_tokens.min()) < 1:
            raise DataError(f"{self.name}: prompts and answers have at least one token")
        if self.hash_ids is not None:
            blocks = -(-self.prompt_tokens // HASHED_TOKENS)
            if [len(ids) for ids in self.hash_ids] != blocks.tolist():
                raise DataError(f"{self.name}: a prompt has one hash id for every {HASHED_TOKENS} tokens")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, index: ArrayLike) -> "Workload":
        """The requests at `index`, ascending, with the times they have."""
        picked = np.asarray(index)
        return Workload(self.name, self.arrival_s[picked], self.prompt_tokens[picked],
                        self.output_tokens[picked], self.expected_tokens[picked],
                        None if self.app is None else self.app[picked],
                        None if self.hash_ids is None else tuple(self.hash_ids[i] for i in picked))

    def sha256(self) -> str:
        """Of arrivals, lengths and scores, to tell whether two results saw the same requests."""
        digest = hashlib.sha256()
        for column in (self.arrival_s, self.prompt_tokens, self.output_tokens, self.expected_tokens):
            digest.update(np.ascontiguousarray(column).tobytes())
        if self.app is not None:
            digest.update("\n".join(self.app).encode())
        if self.hash_ids is not None:
            digest.update(repr(self.hash_ids).encode())
        return digest.hexdigest()


def make_workload(name: str, arrival_s: ArrayLike, prompt_tokens: ArrayLike, output_tokens: ArrayLike,
                  expected_tokens: ArrayLike | None = None, app: ArrayLike | None = None,
                  hash_ids: Sequence[Sequence[int]] | None = None) -> Workload:
    """A workload of anything array-like, sorted by arrival (stable); not scored if no scores are given.

    Raises: DataError: if the columns differ in length, or a value is out of range.
    """
    arrivals = np.asarray(arrival_s, dtype=np.float64)
    expected = np.full(arrivals.shape, np.nan) if expected_tokens is None else expected_tokens
    prompts, outputs = np.asarray(prompt_tokens, np.int64), np.asarray(output_tokens, np.int64)
    scores = np.asarray(expected, np.float64)
    apps = None if app is None else np.asarray(app, np.str_)
    order = np.argsort(arrivals, kind="stable")
    if not prompts.shape == outputs.shape == scores.shape == arrivals.shape or (
            apps is not None and apps.shape != arrivals.shape) or (
            hash_ids is not None and len(hash_ids) != len(arrivals)):
        raise DataError(f"{name}: a workload needs columns of one length")
    return Workload(name, arrivals[order], prompts[order], outputs[order], scores[order],
                    None if apps is None else apps[order],
                    None if hash_ids is None else tuple(tuple(hash_ids[i]) for i in order))


# --- Traces -------------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> Workload:
    """Read `arrival_s,prompt_tokens,output_tokens[,score][,app]`, plain or gzipped CSV with a header.

    `score` is in expected output tokens, empty for a request without one. `app` names the application that
    sent a request, as `type/number` or without a type, empty for a request that is its own; `justitia` and
    `vtc` share the engine among them. A file named .jsonl[.gz] is a trace as Mooncake publishes them, which
    says what prompts share (arXiv 2407.00079): `timestamp` in ms, `input_length`, `output_length`,
    `hash_ids`, an object a line.

    Raises: DataError: names file and line of what is wrong: a column missing or unknown, a time that is
        negative or earlier than the line before, a length below 1 or above 10,000,000, a score that is not
        positive, no request at all.
    """
    path = Path(path)
    if ".jsonl" in path.suffixes:
        return _read_mooncake(path)
    lines = _lines(path)
    _, header = next(lines, (1, []))
    missing = [name for name in _REQUIRED if name not in header]
    unknown = [name for name in header if name not in _REQUIRED + _OPTIONAL]
    if missing or unknown or len(set(header)) < len(header):
        problem = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown) or 'one twice'}"
        raise DataError(f"{path}:1: the header {problem}; columns are {','.join(_REQUIRED)}[,score][,app]")
    time, prompt, output = (header.index(name) for name in _REQUIRED)
    score = header.index("score") if "score" in header else None
    app = header.index("app") if "app" in header else None
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    scores: list[float] = []
    apps: list[str] = []
    for number, row in lines:
        where = f"{path}:{number}"
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} fields, the header has {len(header)}")
        arrivals.append(_time(where, "arrival_s", row[time], arrivals[-1] if arrivals else 0.0))
        prompts.append(_length(where, "prompt_tokens", row[prompt]))
        outputs.append(_length(where, "output_tokens", row[output]))
        scores.append(math.nan if score is None else _score(where, row[score]))
        apps.append("" if app is None else row[app])
    if not arrivals:
        raise DataError(f"{path}: the file has no requests")
    return make_workload(_name(path), arrivals, prompts, outputs, scores, apps if any(apps) else None)


def _read_mooncake(path: Path) -> Workload:
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    hash_ids: list[list[int]] = []
    milliseconds = 0.0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
                time, prompt, output, ids = (row[name] for name in _MOONCAKE)
                ids = [int(name) for name in ids]
            except (ValueError, TypeError, KeyError) as error:
                fields = ", ".join(_MOONCAKE)
                raise DataError(f"{where}: expected an object with {fields} ({error!r})") from error
            milliseconds = _time(where, "timestamp", str(time), milliseconds)
            arrivals.append(milliseconds / 1000)
            prompts.append(_length(where, "input_length", str(prompt)))
            outputs.append(_length(where, "output_length", str(output)))
            if len(ids) != -(-prompts[-1] // HASHED_TOKENS):
                raise DataError(f"{where}: {len(ids)} hash_ids for {prompt} tokens; there is one for every "
                                f"{HASHED_TOKENS}")
            hash_ids.append(ids)
    if not arrivals:
        raise DataError(f"{path}: the file has no requests")
    return make_workload(_name(path), arrivals, prompts, outputs, hash_ids=hash_ids)


def _name(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")
    return name.removeprefix("trace_").removesuffix("_trace")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    with _opened(path) as file:
        reader = csv.reader(file)
        for row in reader:
            if row:
                yield reader.line_num, [field.strip() for field in row]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        kind = "JSON lines" if ".jsonl" in path.suffixes else "CSV"
        raise DataError(f"{path}: cannot be read ({error}); expected {kind}, gzipped if named .gz") from error


def _time(where: str, column: str, text: str, previous: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {column} must be a number, got {text!r}") from None
    if not 0 <= value < math.inf:
        raise DataError(f"{where}: {column} must be finite and not negative, got {text}")
    if value < previous:
        raise DataError(f"{where}: {column} {text} is earlier than the line before; sort by it")
    return value


def _length(where: str, column: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise DataError(f"{where}: {column} must be a whole number, got {text!r}") from None
    if not 1 <= value <= MAX_TOKENS:
        raise DataError(f"{where}: {column} must be from 1 to {MAX_TOKENS:,}, got {text}")
    return value


def _score(where: str, text: str) -> float:
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: score must be a number of expected output tokens, got {text!r}") from None
    if not 0 < value < math.inf:
        raise DataError(f"{where}: score must be finite and positive, got {text}")
    return value


# --- Prompts with recorded lengths --------------------------------------------------------------------------


class PromptScorer(Protocol):
    """Gives expected output tokens, (B,), for prompts, as `Ranker` with a token map does."""

    def __call__(self, prompts: Sequence[str]) -> ArrayLike: ...


def from_lengths(file: LengthFile, model: str, count: int, *, seed: int, scorer: PromptScorer | None = None,
                 arrivals: Workload | None = None) -> Workload:
    """`count` prompts drawn from a length file with the lengths of `model`'s answers.

    They arrive at the times of `arrivals`, its first `count`; without it by a Poisson process of 1 request/s,
    to be scaled. Prompts are drawn without replacement as far as the file goes, each scored once.

    Raises: DataError: if the file has no lengths of `model`, or `arrivals` has fewer than `count` requests.
    """
    file.require_model(model)
    rows = [row for row in file.rows if model in row.output_tokens]
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))]
    picks = np.concatenate(rounds)[:count]
    expected = None
    if scorer is not None:
        drawn = np.unique(picks)
        of_row = np.full(len(rows), np.nan)
        of_row[drawn] = np.asarray(scorer([rows[i].prompt for i in drawn]), dtype=np.float64)
        expected = of_row[picks]
    if arrivals is None:
        times = np.sort(rng.uniform(0, count, count))
    elif len(arrivals) < count:
        raise DataError(f"{arrivals.name}: {len(arrivals)} arrivals for {count} requests")
    else:
        times = arrivals.arrival_s[:count]
    prompt_tokens = np.array([max(1, len(row.prompt) // CHARS_PER_TOKEN) for row in rows])
    output_tokens = np.array([row.output_tokens[model] for row in rows])
    name = file.name if arrivals is None else f"{file.name}@{arrivals.name}"
    return make_workload(name, times, prompt_tokens[picks], output_tokens[picks], expected)


# --- Times --------------------------------------------------------------------------------------------------


def poisson(workload: Workload, *, seed: int) -> Workload:
    """The same requests at uniform times over as many seconds: a Poisson process of a given number."""
    rng = np.random.default_rng(seed)
    return replace(workload, arrival_s=np.sort(rng.uniform(0, len(workload), len(workload))))


def with_ties_shuffled(workload: Workload, *, seed: int) -> Workload:
    """Requests of equal arrival in random order: some logs sort them by length, which no server could."""
    rng = np.random.default_rng((seed, 4))
    order = np.lexsort((rng.permutation(len(workload)), workload.arrival_s))
    return workload.take(order)


def with_burst(workload: Workload, share: float, *, seed: int) -> Workload:
    """Move a random `share` of the requests to one moment, the middle of the span of arrivals.

    Raises: DataError: if the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of a burst must be from 0 to 1, got {share}")
    rng = np.random.default_rng(seed)
    moved = rng.choice(len(workload), round(share * len(workload)), replace=False)
    times = workload.arrival_s.copy()
    times[moved] = times[0] + 0.5 * (times[-1] - times[0])
    return make_workload(workload.name, times, workload.prompt_tokens, workload.output_tokens,
                         workload.expected_tokens, workload.app, workload.hash_ids)


def at_load(workload: Workload, load: float, capacity_tok_s: float) -> Workload:
    """Stretch the arrivals so that the output tokens offered a second are `load` times the capacity.

    Raises: DataError: if the load or the capacity is not positive, or all requests arrive at once and there
        is no span to stretch.
    """
    if not 0 < load < math.inf:
        raise DataError(f"a load must be positive, got {load}")
    if not 0 < capacity_tok_s < math.inf:
        raise DataError(f"a capacity must be positive, got {capacity_tok_s} tokens/s; measure it on "
                        "more requests")
    times = workload.arrival_s - workload.arrival_s[0]
    if times[-1] == 0:
        raise DataError(f"{workload.name}: all requests arrive at once, so no load can be set; "
                        "give it Poisson arrivals")
    span = float(workload.output_tokens.sum()) / (load * capacity_tok_s)
    return replace(workload, arrival_s=times * (span / times[-1]))


# --- Scores -------------------------------------------------------------------------------------------------


def with_noisy_scores(workload: Workload, tau: float, *, seed: int) -> Workload:
    """Scores whose Kendall tau-b with the real lengths is `tau`, from 1 (the lengths) to 0 (random).

    Ranks follow log length plus Gaussian noise, and the real lengths are dealt out in that order, so that the
    scores are spread as the lengths are at every tau. A ranker whose expectation shrinks to the mean when it
    knows little is gentler than this. The same seed gives the same noise at every tau.

    Raises: DataError: if tau is not from 0 to 1.
    """
    if not 0 <= tau <= 1:
        raise DataError(f"tau must be from 0 (random) to 1 (perfect), got {tau}")
    lengths = workload.output_tokens.astype(np.float64)
    if tau == 1 or len(workload) < 2 or lengths.min() == lengths.max():
        return replace(workload, expected_tokens=lengths)
    from scipy.optimize import brentq  # slow to import, like what follows

    from pars_fast.metrics import kendall_tau

    log_lengths = np.log(lengths)
    signal = (log_lengths - log_lengths.mean()) / log_lengths.std()
    rng = np.random.default_rng((seed, 1))
    noise = rng.standard_normal(len(workload))
    sample = rng.choice(len(workload), min(_TAU_SAMPLE, len(workload)), replace=False)

    def scores(angle: float, among: NDArray[np.int64]) -> NDArray[np.float64]:
        noisy = math.cos(angle) * signal[among] + math.sin(angle) * noise[among]
        dealt = np.empty(len(among))
        dealt[np.argsort(noisy, kind="stable")] = np.sort(lengths[among])
        return dealt

    def excess(angle: float) -> float:
        return kendall_tau(scores(angle, sample), lengths[sample]) - tau

    steepest = math.pi / 2 + 0.5  # beyond a right angle, so that the noise of a small sample still has its 0
    angle = brentq(excess, 0.0, steepest, xtol=1e-5) if excess(steepest) < 0 else steepest
    return replace(workload, expected_tokens=scores(angle, np.arange(len(workload))))


def with_unscored(workload: Workload, share: float, *, seed: int) -> Workload:
    """Take the scores of a random `share` of the requests; a larger share takes those of a smaller too."""
    if not 0 <= share <= 1:
        raise DataError(f"the share of unscored requests must be from 0 to 1, got {share}")
    rank = np.random.default_rng((seed, 2)).permutation(len(workload))
    unscored = rank < round(share * len(workload))
    return replace(workload, expected_tokens=np.where(unscored, np.nan, workload.expected_tokens))
