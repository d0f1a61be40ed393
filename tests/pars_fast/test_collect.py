"""Against a small real HTTP server that fails on demand."""

import json
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pars_fast import collect_ray
from pars_fast.cli import main
from pars_fast.collect import CollectError, Collection, collect, read_prompts
from pars_fast.data import read_length_file, split_of
from pars_fast.errors import DataError, OutputError, ParsFastError

pytest.importorskip("httpx")

PROMPTS = [f"prompt {n}" for n in range(12)]


class FakeServer(ThreadingHTTPServer):
    """Answers `prompt n` in n + 1 tokens; `failures` maps a prompt to the statuses of its next answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.failures: dict[str, list[int]] = {}
        self.headers_seen: list[Any] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.everyone: threading.Barrier | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            server.asked[prompt] += 1
            server.headers_seen.append(self.headers)
            status = server.failures[prompt].pop(0) if server.failures.get(prompt) else 200
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        if server.everyone is not None:
            server.everyone.wait(timeout=10)
        with server.lock:
            server.busy -= 1
        tokens = min(int(prompt.split()[1]) + 1, body["max_tokens"])
        reason = "length" if tokens == body["max_tokens"] else "stop"
        usage = {"completion_tokens": tokens}
        self._answer(status, {"choices": [{"finish_reason": reason}], "usage": usage})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if status == 429:
            self.send_header("retry-after", "0.01")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


def asking(server: FakeServer, **changes: Any) -> Collection:
    return Collection(**{"endpoint": server.url, "backoff_s": 0.001, "concurrency": 4, **changes})


def test_what_is_collected_is_a_length_file(server: FakeServer, tmp_path: Path) -> None:
    report = collect(PROMPTS, tmp_path / "lengths_mine.jsonl", asking(server, samples=2))
    assert (report.wanted, report.already, report.collected, report.failed) == (24, 0, 24, 0)
    file = read_length_file(tmp_path / "lengths_mine.jsonl")
    assert file.name == "mine"
    assert {row.prompt: row.output_tokens for row in file.rows} == {
        f"prompt {n}": {"served": n + 1} for n in range(12)
    }
    assert {row.prompt: row.split for row in file.rows} == {prompt: split_of(prompt) for prompt in PROMPTS}
    assert set(server.asked.values()) == {2}


def test_a_length_is_the_geometric_mean_of_its_samples(tmp_path: Path, server: FakeServer) -> None:
    out = tmp_path / "out.jsonl"
    collect(["prompt 0"], out, asking(server, samples=2))
    with sqlite3.connect(tmp_path / "out.jsonl.sqlite") as database:
        database.execute("UPDATE answers SET output_tokens = 100 WHERE sample = 1")
    collect(["prompt 0"], out, asking(server, samples=2))
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["output_tokens"] == {"served": 10}
    assert row["samples"] == {"served": [1, 100]}


def test_requests_are_under_way_at_once_and_no_more_than_asked(server: FakeServer, tmp_path: Path) -> None:
    server.everyone = threading.Barrier(4)  # nobody is answered before four have come
    collect(PROMPTS, tmp_path / "out.jsonl", asking(server, concurrency=4))
    assert server.most_busy == 4


@pytest.mark.parametrize("statuses", [[500], [429, 503], [502, 504, 408]], ids=str)
def test_failures_that_may_pass_are_tried_again(
    server: FakeServer, tmp_path: Path, statuses: list[int]
) -> None:
    server.failures["prompt 3"] = list(statuses)
    report = collect(PROMPTS, tmp_path / "out.jsonl", asking(server))
    assert (report.collected, report.failed) == (12, 0)
    assert server.asked["prompt 3"] == 1 + len(statuses)


def test_a_request_given_up_is_asked_for_by_the_next_run_alone(server: FakeServer, tmp_path: Path) -> None:
    server.failures["prompt 3"] = [500, 500]
    first = collect(PROMPTS, tmp_path / "out.jsonl", asking(server, attempts=2))
    assert (first.collected, first.failed) == (11, 1)
    assert len(read_length_file(tmp_path / "out.jsonl").rows) == 11
    second = collect(PROMPTS, tmp_path / "out.jsonl", asking(server, attempts=2))
    assert (second.already, second.collected, second.failed) == (11, 1, 0)
    assert server.asked == Counter(dict.fromkeys(PROMPTS, 1) | {"prompt 3": 3})


def test_a_run_that_is_ended_keeps_what_it_has(server: FakeServer, tmp_path: Path) -> None:
    def stop(report: Any) -> None:
        if report.collected == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(PROMPTS, tmp_path / "out.jsonl", asking(server), on_answer=stop)
    kept = len(read_length_file(tmp_path / "out.jsonl").rows)
    assert kept >= 5
    report = collect(PROMPTS, tmp_path / "out.jsonl", asking(server))
    assert (report.already, report.already + report.collected) == (kept, 12)


def test_a_refused_prompt_does_not_stop_the_others(server: FakeServer, tmp_path: Path) -> None:
    server.failures["prompt 3"] = [400] * 9
    report = collect(PROMPTS, tmp_path / "out.jsonl", asking(server))
    assert (report.collected, report.refused) == (11, 1)
    assert server.asked["prompt 3"] == 1


def test_a_server_that_lets_nobody_in_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    server.failures = {prompt: [401] for prompt in PROMPTS}
    with pytest.raises(CollectError, match="answered HTTP 401"):
        collect(PROMPTS, tmp_path / "out.jsonl", asking(server))


def test_a_server_that_goes_down_stops_the_run_in_bounded_tries(server: FakeServer, tmp_path: Path) -> None:
    server.failures = {prompt: [500] * 99 for prompt in PROMPTS}
    with pytest.raises(CollectError, match="cannot be used: HTTP 500"):
        collect(PROMPTS, tmp_path / "out.jsonl", asking(server, concurrency=1, attempts=2))
    assert sum(server.asked.values()) == 6


def test_no_server_there_says_so(tmp_path: Path) -> None:
    nowhere = Collection("http://127.0.0.1:9", attempts=2, backoff_s=0.001)
    with pytest.raises(CollectError, match=r"/v1/models cannot be had \(ConnectError.*is it running"):
        collect(PROMPTS, tmp_path / "out.jsonl", nowhere)


def test_answers_under_other_settings_are_not_mixed(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    cut = collect(PROMPTS, out, asking(server, max_tokens=5))
    assert (cut.collected, cut.at_limit) == (12, 8)
    full = collect(PROMPTS, out, asking(server))
    assert (full.already, full.collected) == (0, 12)
    assert max(row.output_tokens["served"] for row in read_length_file(out).rows) == 12


def test_the_key_is_sent(server: FakeServer, tmp_path: Path) -> None:
    collect(PROMPTS[:1], tmp_path / "out.jsonl", asking(server, api_key="secret"))
    assert server.headers_seen[0]["authorization"] == "Bearer secret"


def test_the_command(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "sub" / "lengths_mine.jsonl"
    prompts.write_text("prompt 1\n\nprompt 2\nprompt 1\n")
    command = ["collect", "--endpoint", server.url + "/v1", "--prompts", str(prompts), "--out", str(out)]
    assert main([*command, "--samples", "2"]) == 0
    assert "4 of 4 answers, 4 new" in capsys.readouterr().out.replace("\n", " ")
    assert server.headers_seen[0]["authorization"] == "Bearer mine"
    server.failures["prompt 2"] = [500] * 3
    assert main([*command, "--samples", "3", "--attempts", "1"]) == 1
    assert "1 failed; the same command tries them again" in capsys.readouterr().err


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "two\\nlines", "id": 3}\n{"prompt": "b"}\n')
    assert read_prompts(path) == ["two\nlines", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            r'p\.jsonl:2: expected a JSON object with a "prompt"',
        ),
        ("p.jsonl", '{"prompt": " "}\n', r'p\.jsonl:1: "prompt" must be a non-empty string'),
        ("p.jsonl", "[3]\n", r"p\.jsonl:1: expected"),
        ("p.txt", " \n", "no prompts there"),
    ],
    ids=["no field", "blank", "no object", "empty"],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_lines_end_at_the_line_feed_alone(tmp_path: Path) -> None:
    """U+2028 and others may stand in a JSON string as they are; numbers of lines are those of an editor."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "one\u2028prompt\x85here"}\r\n\n{"prompt": "b"}\n'.encode())
    assert read_prompts(path) == ["one\u2028prompt\x85here", "b"]
    path.write_text('{"prompt": "a"}\n\n\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:4: "):
        read_prompts(path)


@pytest.mark.parametrize("endpoint", ["http://host:port", "http://\x00"])
def test_an_endpoint_that_is_no_url_is_named(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(CollectError, match="no URL of a server"):
        collect(PROMPTS, tmp_path / "out.jsonl", Collection(endpoint))


def test_a_database_that_cannot_be_written_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    def lock(report: Any) -> None:
        """What another program may do to the file while the answers come in."""
        if report.collected == 3:
            with closing(sqlite3.connect(tmp_path / "out.jsonl.sqlite")) as database:
                database.execute("DROP TABLE answers")

    with pytest.raises(DataError, match=r"out\.jsonl\.sqlite: .* \(no such table: answers\); give another"):
        collect(PROMPTS, tmp_path / "out.jsonl", asking(server), on_answer=lock)


def test_a_folder_as_output_is_refused_before_anybody_is_asked(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        collect(PROMPTS, tmp_path, asking(server))
    assert not server.asked


def test_a_file_whose_answers_are_not_there_is_not_replaced(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("lengths of another machine")
    with pytest.raises(OutputError, match=r"out\.jsonl\.sqlite .* is not there; give another --out, or move"):
        collect(PROMPTS, out, asking(server))
    assert not server.asked
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_run_without_an_answer_leaves_the_file_as_it_was(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    collect(PROMPTS, out, asking(server))
    before = out.read_text()
    server.failures = {prompt: [401] for prompt in PROMPTS}
    with pytest.raises(CollectError):
        collect(PROMPTS, out, asking(server, max_tokens=5))
    assert out.read_text() == before


def test_a_file_that_is_no_database_is_named(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.sqlite").write_text("notes" * 99)
    with pytest.raises(DataError, match=r"out\.jsonl\.sqlite: not a file of collected answers"):
        collect(PROMPTS, tmp_path / "out.jsonl", asking(server))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": "localhost:8000"}, "must start with http"),
        ({"samples": 0}, "must be at least 1"),
        ({"temperature": math.nan}, "temperature must be a number >= 0, got nan"),
        ({"timeout_s": 0.0}, "timeout_s must be a number > 0, got 0"),
        ({"api_key": "secret\n"}, "OPENAI_API_KEY.* no HTTP header can carry"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_collection_that_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParsFastError, match=message):
        Collection(**{"endpoint": "http://x", **changes})


def test_splits_are_of_about_the_size_promised() -> None:
    counts = Counter(split_of(f"p{n}") for n in range(4000))
    assert counts["train"] / 4000 == pytest.approx(0.7, abs=0.03)
    assert counts["val"] / 4000 == pytest.approx(0.15, abs=0.03)
    assert split_of(" A  b\n") == split_of("a b")


def test_many_workers_collect_the_same(server: FakeServer, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    out = tmp_path / "out.jsonl"
    server.failures = {"prompt 3": [400], "prompt 4": [500], "prompt 11": [401]}
    collection = asking(server, concurrency=1, attempts=1)
    with collect_ray.cluster():  # a start takes ten seconds: both runs use this one
        with pytest.raises(CollectError, match="HTTP 401"):
            collect(PROMPTS[3:], out, collection, ray_workers=1)
        kept = {row.prompt for row in read_length_file(out).rows}
        assert kept == set(PROMPTS[5:11])  # one was refused, one given up, and the last ended the run
        report = collect(PROMPTS, out, collection, ray_workers=2)
    assert (report.already, report.collected, report.failed) == (6, 6, 0)
    assert {row.prompt: row.output_tokens for row in read_length_file(out).rows} == {
        f"prompt {n}": {"served": n + 1} for n in range(12)
    }
