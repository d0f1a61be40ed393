"""Collect real answer lengths from any OpenAI-compatible server: `pars-fast collect`.

Every answer is written to an SQLite file the moment it comes, so a run that is interrupted loses nothing
and goes on where it was when the same command is given again. The result is a length file as `pars-fast
train --data` reads it. The answers' text is not kept.
"""

import asyncio
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pars_fast.data import split_of
from pars_fast.errors import DataError, OutputError, ParsFastError, make_writable, require_extra
from pars_fast.sqlite_store import SqliteStore
from pars_fast.text import is_text

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    model TEXT NOT NULL, settings TEXT NOT NULL, prompt TEXT NOT NULL, sample INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, finish_reason TEXT,
    PRIMARY KEY (model, settings, prompt, sample)
) WITHOUT ROWID"""
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
REFUSED_PROMPT = {400, 413, 422}  # too long, or against the server's rules: the other prompts can go on
MAX_BACKOFF_S = 60.0
FAILURES_PER_WORKER = 2  # given up one after another, and the server is taken to be down


class CollectError(ParsFastError):
    """The server cannot be used as asked; the message says what it answered."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What is asked of the server.

    `endpoint` is the base URL, with or without /v1. An answer that ends at `max_tokens` is counted as that
    long: a lower bound, and the report says how many there were. `concurrency` is the number of requests
    under way; a request is tried `attempts` times, after growing pauses that start at `backoff_s`.
    """

    endpoint: str
    model: str | None = None
    samples: int = 1
    concurrency: int = 8
    max_tokens: int = 4096
    temperature: float = 1.0
    attempts: int = 6
    backoff_s: float = 1.0
    timeout_s: float = 600.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ParsFastError(f"--endpoint must start with http:// or https://, got {self.endpoint!r}")
        if min(self.samples, self.concurrency, self.max_tokens, self.attempts) < 1:
            raise ParsFastError("samples, concurrency, max_tokens and attempts must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ParsFastError(f"temperature must be a number >= 0, got {self.temperature}")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ParsFastError(f"timeout_s must be a number > 0, got {self.timeout_s}")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ParsFastError("the API key (OPENAI_API_KEY) holds what no HTTP header can carry")

    @property
    def base_url(self) -> str:
        return self.endpoint.rstrip("/").removesuffix("/v1") + "/v1"

    @property
    def settings(self) -> str:
        """What an answer's length depends on: answers got under other settings are not mixed in."""
        return json.dumps({"max_tokens": self.max_tokens, "temperature": self.temperature})


@dataclass(slots=True)
class Report:
    """What a run did. `refused` are prompts the server rejected, `failed` requests given up for now."""

    wanted: int
    already: int
    collected: int = 0
    at_limit: int = 0
    refused: int = 0
    failed: int = 0


def read_prompts(path: str | Path) -> list[str]:
    """The distinct prompts of a file, as `read_prompt_lines` reads them."""
    return list(dict.fromkeys(prompt for _, prompt in read_prompt_lines(path)))


def read_prompt_lines(path: str | Path) -> list[tuple[int, str]]:
    """(line, prompt) of a file: JSON lines with a "prompt", or plain text, one prompt a line; blank ones are
    skipped.

    Raises: DataError: if the file cannot be read, holds no prompt, or a JSON line has no prompt.
    """
    path = Path(path)
    try:  # split at the line feed alone: other ends of lines, such as U+2028, may stand in a prompt
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected JSON lines or plain text") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no prompts there; expected JSON lines or plain text, one prompt a line")
    is_json = path.suffix == ".jsonl"
    return [(number, _prompt_of(path, number, line) if is_json else line.strip()) for number, line in lines]


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}:{number}: expected a JSON object with a "prompt"') from error
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise DataError(f'{path}:{number}: "prompt" must be a non-empty string of text')
    return prompt


class AnswerStore(SqliteStore):
    """One row an answer, committed as it comes.

    Raises: DataError: if the file is something else, or cannot be read or written; so does each method.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA, "collected answers")

    def add(
        self, model: str, settings: str, prompt: str, sample: int, tokens: int, reason: str | None
    ) -> None:
        with self._named("the answer cannot be kept"), self._connection:
            row = (model, settings, prompt, sample, tokens, reason)
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def have(self, model: str, settings: str) -> set[tuple[str, int]]:
        """(prompt, sample) of the answers that are there."""
        query = "SELECT prompt, sample FROM answers WHERE model = ? AND settings = ?"
        with self._named("cannot be read"):
            return set(self._connection.execute(query, (model, settings)))

    def export(self, path: Path, settings: str) -> None:
        """Write a length file of the answers under these settings, in one step; without any, none is written.

        A model's length is the geometric mean of its samples, which is the mean of what is learnt, the log;
        the samples stand beside it.
        """
        samples: dict[str, dict[str, list[int]]] = {}
        query = (
            "SELECT prompt, model, output_tokens FROM answers WHERE settings = ? "
            "ORDER BY prompt, model, sample"
        )
        with self._named("cannot be read"):
            for prompt, model, tokens in self._connection.execute(query, (settings,)):
                samples.setdefault(prompt, {}).setdefault(model, []).append(tokens)
        if not samples:
            return
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            for prompt, by_model in samples.items():
                means = {m: round(math.exp(sum(map(math.log, n)) / len(n))) for m, n in by_model.items()}
                name = hashlib.sha256(prompt.encode()).hexdigest()[:16]
                row = {"id": name, "split": split_of(prompt), "prompt": prompt, "output_tokens": means}
                file.write(json.dumps({**row, "samples": by_model}) + "\n")
        fresh.replace(path)


def collect(
    prompts: Sequence[str],
    out: Path,
    collection: Collection,
    *,
    ray_workers: int = 0,
    on_answer: Callable[[Report], None] | None = None,
) -> Report:
    """Ask for what is still missing, and write the length file `out`; answers are kept in `out`.sqlite.

    `ray_workers` of a Ray cluster ask, each with `collection.concurrency` requests under way; 0 asks from
    here. `on_answer` is called when a request has ended, however it did.

    Raises: CollectError: if the server cannot be reached or used at all; what came before is kept.
        MissingExtraError: without httpx, or ray. DataError: if the SQLite file is something else or cannot be
        written. OutputError: if `out` cannot be written, or is there without its SQLite file.
    """
    require_extra("httpx", "train")
    if ray_workers:
        require_extra("ray.data", "ray")
    if out.is_dir():
        raise OutputError(f"{out}: cannot be written (it is a folder)")
    kept = out.with_name(out.name + ".sqlite")
    if out.exists() and not kept.exists():
        raise OutputError(
            f"{out} would be replaced, and {kept.name} with the answers it was made of is not there; give "
            "another --out, or move that file away"
        )
    make_writable(out.parent)
    with closing(AnswerStore(kept)) as store:
        try:
            return _collect(prompts, collection, store, ray_workers, on_answer or (lambda report: None))
        finally:
            store.export(out, collection.settings)


def _collect(
    prompts: Sequence[str],
    collection: Collection,
    store: AnswerStore,
    ray_workers: int,
    on_answer: Callable[[Report], None],
) -> Report:
    model = collection.model or asyncio.run(_served_model(collection))
    have = store.have(model, collection.settings)
    missing = [
        (prompt, sample)
        for sample in range(collection.samples)  # a sample of every prompt before the next of any
        for prompt in prompts
        if (prompt, sample) not in have
    ]
    wanted = len(prompts) * collection.samples
    report = Report(wanted, wanted - len(missing))

    def take(outcome: Outcome) -> None:
        if outcome.tokens is not None:
            reason = outcome.finish_reason
            store.add(model, collection.settings, outcome.prompt, outcome.sample, outcome.tokens, reason)
            report.collected += 1
            report.at_limit += reason == "length"
        elif outcome.failure is None:
            report.refused += 1
        else:
            report.failed += 1
        on_answer(report)

    if ray_workers:
        from pars_fast.collect_ray import ask_on_ray

        for outcome in ask_on_ray(missing, collection, model, ray_workers):
            take(outcome)
    else:
        asyncio.run(ask_all(missing, collection, model, take))
    return report


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended: with an answer of `tokens`; refused for good, with neither `tokens` nor a
    `failure`; or given up for now, for the reason `failure`."""

    prompt: str
    sample: int
    tokens: int | None = None
    finish_reason: str | None = None
    failure: str | None = None


async def ask_all(
    wanted: Iterable[tuple[str, int]], collection: Collection, model: str, take: Callable[[Outcome], None]
) -> None:
    """Ask for (prompt, sample), `collection.concurrency` at a time, and give each outcome to `take`.

    Raises: CollectError: if the server cannot be used; what came before has been taken.
    """
    todo = iter(wanted)
    failed_in_a_row = 0

    async def worker(client: Any) -> None:
        nonlocal failed_in_a_row
        for prompt, sample in todo:  # shared: each worker takes the next
            try:
                outcome = Outcome(prompt, sample, *await _ask(client, collection, model, prompt))
                failed_in_a_row = 0
            except _RefusedError:
                outcome = Outcome(prompt, sample)
            except _GaveUpError as error:
                outcome = Outcome(prompt, sample, failure=str(error))
                failed_in_a_row += 1
                if failed_in_a_row > FAILURES_PER_WORKER * collection.concurrency:
                    raise CollectError(f"{collection.base_url} cannot be used: {error}") from error
            take(outcome)

    async with _client(collection) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(collection.concurrency):
                    group.create_task(worker(client))
        except* ParsFastError as errors:
            raise errors.exceptions[0] from None


def _client(collection: Collection) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {collection.api_key}"} if collection.api_key else {}
    limits = httpx.Limits(max_connections=collection.concurrency)
    try:
        return httpx.AsyncClient(
            base_url=collection.base_url, headers=headers, timeout=collection.timeout_s, limits=limits
        )
    except httpx.InvalidURL as error:
        raise CollectError(f"{collection.base_url}: no URL of a server ({error})") from error


class _RefusedError(Exception):
    """This prompt will never be answered."""


class _GaveUpError(Exception):
    """All attempts failed; the next run may try again."""


async def _served_model(collection: Collection) -> str:
    try:
        async with _client(collection) as client:
            answer = await _attempts(collection, lambda: client.get("/models"))
    except _GaveUpError as error:
        raise CollectError(f"{collection.base_url}/models cannot be had ({error}); is it running?") from error
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise CollectError(f"{collection.base_url}/models names no model; give --model") from error


async def _ask(client: Any, collection: Collection, model: str, prompt: str) -> tuple[int, str | None]:
    """(output tokens, finish reason) of one answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": collection.max_tokens,
        "temperature": collection.temperature,
    }
    answer = await _attempts(collection, lambda: client.post("/chat/completions", json=body))
    try:
        content = answer.json()
        tokens, reason = content["usage"]["completion_tokens"], content["choices"][0].get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CollectError(
            f"{collection.base_url} gives no usage.completion_tokens with an answer"
        ) from error
    if not isinstance(tokens, int) or tokens < 1:
        raise _RefusedError  # an empty answer is no length
    return tokens, reason


async def _attempts(collection: Collection, request: Callable[[], Any]) -> Any:
    """The response, of status 200; failures that may pass are tried again after growing, jittered pauses."""
    import httpx

    for attempt in range(collection.attempts):
        reason, pause_s = "", collection.backoff_s * 2**attempt * random.uniform(0.5, 1.5)
        try:
            response = await request()
        except httpx.RequestError as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if response.status_code == 200:
                return response
            reason = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code in REFUSED_PROMPT and response.request.method == "POST":
                raise _RefusedError
            if response.status_code not in RETRIED:
                raise CollectError(f"{collection.base_url} answered {reason}")
            pause_s = max(pause_s, _retry_after(response))
        if attempt + 1 < collection.attempts:
            await asyncio.sleep(min(pause_s, MAX_BACKOFF_S))
    raise _GaveUpError(reason)


def _retry_after(response: Any) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or gives a date."""
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


@contextmanager
def progress(total: int) -> Iterator[Callable[[Report], None]]:
    """A progress bar for `collect`'s `on_answer`, in answers."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task, drawn_at = bar.add_task("collecting", total=total), 0.0

        def show(report: Report) -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at > 0.1:
                drawn_at = time.monotonic()
                done = report.already + report.collected + report.refused + report.failed
                bar.update(task, completed=done, description=f"collecting, {report.failed} failed")

        yield show
