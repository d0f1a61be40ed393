"""The real runtimes: a ranker process that scores, dies, is killed and comes back, and a ranker thread."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pars_fast import Ranker
from pars_fast.errors import KernelError
from pars_fast.integration import gpu_scoring, gpu_trial, runtime_choice
from pars_fast.integration.process_runtime import ProcessRuntime
from pars_fast.integration.ranker_process import BATCH_PROMPTS
from pars_fast.integration.runtime import READY, Prompt, Scored, ThreadRuntime
from pars_fast.integration.runtime_choice import make_runtime
from pars_fast.policies.prompt_size import PROMPT_WORK
from pars_fast.settings import Settings
from tests.processes import is_running, wait_for


def whole(seq: int, ids: list[int]) -> Prompt:
    """A prompt of which nothing is cut."""
    return Prompt(seq, ids, len(ids))


@pytest.fixture
def start_process(ranker_dir: Path, served_model: Path) -> Iterator[Callable[..., ProcessRuntime]]:
    """A started process runtime; killed at the end, whatever happened."""
    started: list[ProcessRuntime] = []

    def start(ranker: Path = ranker_dir, chat_template: Path | None = None) -> ProcessRuntime:
        started.append(ProcessRuntime(str(ranker), str(served_model), None, 1, chat_template))
        started[-1].start()
        return started[-1]

    yield start
    for runtime in started:
        runtime.close()
        for process in runtime._killed:
            process.wait()


def tokens_of(scored: Sequence[Scored]) -> dict[int, float]:
    return {each.seq: each.expected_tokens for each in scored}


def collect(runtime: Any, count: int) -> list[Scored]:
    """The next `count` messages of a runtime; fails at once if the ranker ends."""
    scored: list[Scored] = []

    def enough() -> bool:
        scored.extend(runtime.poll())
        assert len(scored) >= count or runtime.failure() is None, runtime.failure()
        return len(scored) >= count

    wait_for(enough)
    return scored


def process_of(runtime: ProcessRuntime) -> "subprocess.Popen[bytes]":
    assert runtime._process is not None
    return runtime._process


def test_a_process_scores_as_the_library_does_and_survives_a_kill(
    start_process: Callable[..., ProcessRuntime],
    ranker_dir: Path,
    served_model: Path,
    make_prompts: Callable[[int], list[str]],
    tmp_path: Path,
) -> None:
    """Of prompts some are chats by a template that is not the tokenizer's."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}: {{ m.content }}\n{% endfor %}A:"
    )
    runtime = start_process(chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    texts = make_prompts(3 * BATCH_PROMPTS + 1)
    said = [text if seq % 2 else f"Q: {text}\nA:" for seq, text in enumerate(texts)]
    prompts = [whole(seq, tokenizer.encode(text)) for seq, text in enumerate(said)]
    ranker = Ranker.from_pretrained(ranker_dir, device="cpu")
    assert ranker.token_map is not None
    expected = dict(enumerate(ranker.token_map(ranker.score(texts).numpy())))
    assert len(set(expected.values())) > len(texts) // 2  # the toy ranker tells prompts apart

    assert collect(runtime, 1) == [READY]
    assert runtime.submit(prompts)
    assert tokens_of(collect(runtime, len(prompts))) == pytest.approx(expected, rel=1e-4)

    # One prompt without text in it harms no other, and an id past the vocabulary harms nobody.
    assert runtime.submit([whole(100, tokenizer.encode("   ")), whole(101, [10**6]), *prompts[:1]])
    scored = tokens_of(collect(runtime, 3))
    assert math.isnan(scored[100])
    assert scored[0] == pytest.approx(expected[0], rel=1e-4)

    process = process_of(runtime)
    assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    process.send_signal(signal.SIGKILL)
    assert wait_for(runtime.failure, 10.0) == "the ranker process ended with code -9"
    assert not runtime.submit(prompts)  # nobody there, and the caller is not kept waiting
    assert runtime.poll() == []

    runtime.start()
    assert runtime.failure() is None
    assert collect(runtime, 1) == [READY]
    assert runtime.submit(prompts[:2])
    assert tokens_of(collect(runtime, 2)) == pytest.approx({seq: expected[seq] for seq in (0, 1)}, rel=1e-4)

    process = process_of(runtime)
    runtime.close()
    assert process.wait(10.0) == -signal.SIGKILL
    runtime.close()


def damaged(ranker_dir: Path, folder: Path) -> Path:
    """A copy of the ranker with half of its weights file."""
    folder.mkdir()
    for file in ranker_dir.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    return folder


def test_a_missing_or_damaged_checkpoint_is_a_failure_not_a_crash(
    start_process: Callable[..., ProcessRuntime], ranker_dir: Path, tmp_path: Path
) -> None:
    runtimes = [start_process(tmp_path / "missing"), start_process(damaged(ranker_dir, tmp_path / "damaged"))]
    for runtime in runtimes:  # both at once: each takes seconds to import torch
        assert wait_for(runtime.failure) == "the ranker process ended with code 1"
        assert runtime.poll() == []


OWNER = """
import sys, time
from pars_fast.integration.process_runtime import ProcessRuntime
from pars_fast.integration.runtime import Prompt
runtime = ProcessRuntime(sys.argv[1], sys.argv[2], None, 1)
runtime.start()
while not runtime.poll():
    time.sleep(0.01)
if num_prompts := int(sys.argv[3]):
    runtime.submit([Prompt(seq, [7, 8, 9], 3) for seq in range(num_prompts)])
    while not runtime.poll():
        time.sleep(0.01)
print(runtime._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("num_prompts", [0, 50_000], ids=["idle", "busy"])
def test_the_process_ends_when_its_engine_is_killed(
    num_prompts: int, ranker_dir: Path, served_model: Path
) -> None:
    """A busy one scores for half a minute, and has answers that nobody takes."""
    command = [sys.executable, "-c", OWNER, str(ranker_dir), str(served_model), str(num_prompts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            ranker_pid = int(owner.stdout.readline())
        finally:
            owner.kill()
    wait_for(lambda: not is_running(ranker_pid))  # first it imports torch, at idle priority


def test_what_is_no_process_needs_no_socket() -> None:
    code = "import sys, pars_fast.integration.runtime; print({'zmq', 'msgspec'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert shown.stdout == "set()\n", shown.stderr


def test_a_start_imports_no_more_than_it_needs(served_model: Path) -> None:
    """At idle priority, on a machine that serves, each second of imports is one without a ranker."""
    code = (
        "import sys; import pars_fast.integration.ranker_process as process; "
        f"process.PromptScorer(process.Ranker.from_pretrained('small'), {str(served_model)!r}, None, None); "
        "print({'vllm', 'sklearn', 'scipy.stats', 'transformers.generation.utils'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert shown.stdout == "set()\n", shown.stderr


def test_nobody_waits_for_a_process_that_is_ended(
    start_process: Callable[..., ProcessRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hang in a driver, where no signal reaches it; when it has ended it is reaped all the same."""
    runtime = start_process()
    first = process_of(runtime)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", lambda *_, **__: pytest.fail("it waits"))
        runtime.start()
        wait_for(lambda: not is_running(first.pid))
        runtime.start()
        runtime.close()
    assert first.returncode == -signal.SIGKILL
    assert first not in runtime._killed


def test_a_start_that_fails_is_an_os_error_and_the_next_one_may_succeed(
    start_process: Callable[..., ProcessRuntime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = start_process()
    long = tmp_path / ("long" * 30)  # more than the name of a socket may have
    long.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(long))
        with pytest.raises(OSError, match="is longer than 107 characters"):
            runtime.start()
    assert runtime.failure() is None
    runtime.start()
    assert process_of(runtime).poll() is None
    assert not list(long.iterdir())


class ToyScorer:
    """Scores with a function; its order is by seq. `forgotten` keeps what it was told to drop."""

    def __init__(self, score: Callable[[Sequence[Prompt]], list[Scored]]) -> None:
        self.score = score
        self.scored: list[int] = []
        self.forgotten: list[int] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        self.scored += [prompt.seq for prompt in prompts]
        return self.score(prompts)

    def order(self) -> Sequence[int]:
        return sorted(set(self.scored) - set(self.forgotten))

    def forget(self, seqs: Sequence[int]) -> None:
        self.forgotten += seqs


def lengths(prompts: Sequence[Prompt]) -> list[Scored]:
    return [Scored(prompt.seq, float(len(prompt.ids))) for prompt in prompts]


def test_a_thread_scores() -> None:
    runtime = ThreadRuntime(lambda: ToyScorer(lengths))
    runtime.start()
    assert collect(runtime, 1) == [READY]
    assert runtime.submit([whole(0, [1, 2]), whole(1, [3])])
    assert runtime.submit([whole(2, [4, 5, 6])])
    assert sorted(collect(runtime, 3)) == [Scored(0, 2.0), Scored(1, 1.0), Scored(2, 3.0)]
    assert runtime.order() == [0, 1, 2]
    runtime.forget([1])
    assert runtime.submit([whole(3, [7])])
    assert collect(runtime, 1) == [Scored(3, 1.0)]
    assert runtime.order() == [0, 2, 3]
    assert runtime.failure() is None
    runtime.close()
    runtime.close()


def test_a_thread_whose_scorer_raises_says_so_and_can_be_started_anew() -> None:
    broken = True

    def score(prompts: Sequence[Prompt]) -> list[Scored]:
        if broken:
            raise RuntimeError("out of memory")
        return lengths(prompts)

    runtime = ThreadRuntime(lambda: ToyScorer(score))
    runtime.start()
    runtime.submit([whole(0, [1])])
    assert wait_for(runtime.failure, 10.0) == "the ranker thread ended: RuntimeError('out of memory')"
    broken = False
    runtime.start()
    assert runtime.failure() is None
    runtime.submit([whole(0, [1])])
    assert collect(runtime, 2) == [READY, Scored(0, 1.0)]
    runtime.close()


def test_a_thread_that_cannot_load_its_ranker_says_so() -> None:
    def make_scorer() -> Any:
        raise FileNotFoundError("no config.json there")

    runtime = ThreadRuntime(make_scorer)
    runtime.start()
    assert "no config.json there" in wait_for(runtime.failure, 10.0)
    assert runtime.poll() == []


@pytest.mark.parametrize("error", [KernelError("wrong scores"), RuntimeError("out of memory")])
def test_where_the_gpu_refuses_the_kernels_another_runtime_is_started(error: Exception) -> None:
    def make_scorer() -> Any:
        raise error

    other = ThreadRuntime(lambda: ToyScorer(lengths))
    for given in (other, None):
        runtime = ThreadRuntime(make_scorer, given)
        assert runtime.start() is runtime
        assert str(error) in wait_for(runtime.failure, 10.0)
        refused = isinstance(error, KernelError) and given is not None
        assert runtime.start() is (other if refused else runtime)
        runtime.close()
    other.close()


@pytest.mark.parametrize("end", ["close", "start"])
def test_a_thread_that_is_busy_when_it_is_ended_does_end(end: str) -> None:
    """Closed, or given up for a new one, with prompts still queued: it must not hold its ranker for ever."""
    busy, go_on = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def score(prompts: Sequence[Prompt]) -> list[Scored]:
        threads.append(threading.current_thread())
        busy.set()
        assert go_on.wait(10.0)
        return lengths(prompts)

    runtime = ThreadRuntime(lambda: ToyScorer(score))
    runtime.start()
    runtime.submit([whole(0, [1])])
    assert busy.wait(10.0)
    runtime.submit([whole(1, [1])])
    runtime.close() if end == "close" else runtime.start()
    go_on.set()
    threads[0].join(10.0)
    assert not threads[0].is_alive()
    runtime.close()


def test_on_a_machine_without_a_gpu_the_ranker_is_a_process(ranker_dir: Path, served_model: Path) -> None:
    class Config:
        class model_config:  # noqa: N801
            tokenizer, tokenizer_revision = str(served_model), None

        class parallel_config:  # noqa: N801
            world_size = 1

    runtime = make_runtime(Settings(ranker=str(ranker_dir), device="cpu"), Config)
    assert isinstance(runtime, ProcessRuntime)
    runtime.close()


@pytest.mark.parametrize("policy", ["pars_fast", "pars", "gittins"])
def test_on_a_gpu_the_ranker_is_a_thread_that_weighs_prompts_as_the_policy_does(
    policy: str, served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Config:
        class model_config:  # noqa: N801
            tokenizer, tokenizer_revision = str(served_model), None

    template = served_model / "config.json"  # any file
    asked: dict[str, Any] = {}

    def make(*arguments: Any, **options: Any) -> ToyScorer:
        asked.update(options)
        return ToyScorer(lengths)

    tried: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_scoring, "make_gpu_scorer", make)
    monkeypatch.setattr(gpu_trial, "try_kernels", lambda *arguments: tried.append(arguments))
    runtime = make_runtime(Settings(policy=policy, device="cuda", chat_template=template, gpu_sms=8), Config)
    runtime.start()
    assert collect(runtime, 1) == [READY]
    assert tried == [("default", "cuda:0", 8)]
    assert asked["prompt_work"] == {"pars_fast": PROMPT_WORK}.get(policy, 0.0)
    assert asked["chat_template"] == template
    runtime.close()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_kernels_that_fail_their_trial_leave_the_ranking_to_the_cpu_unless_a_gpu_was_asked_for(
    device: str, ranker_dir: Path, served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Config:
        class model_config:  # noqa: N801
            tokenizer, tokenizer_revision = str(served_model), None

    def refuse(*arguments: Any) -> None:
        raise KernelError("a kernel hung")

    monkeypatch.setattr(runtime_choice, "_ranks_on_gpu", lambda settings, config: True)
    monkeypatch.setattr(gpu_trial, "try_kernels", refuse)
    runtime = make_runtime(Settings(ranker=str(ranker_dir), device=device), Config)
    assert runtime.start() is runtime
    assert "a kernel hung" in wait_for(runtime.failure, 60.0)
    other = runtime.start()
    assert isinstance(other, ProcessRuntime if device == "auto" else ThreadRuntime)
    if device == "auto":
        assert collect(other, 1) == [READY]
    for each in (runtime, other):
        each.close()
