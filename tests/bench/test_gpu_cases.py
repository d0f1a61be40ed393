"""The GPU cases without a GPU: all are listed, named apart, and written down as not measured."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_providers
from bench.gpu_cases import Case, all_cases
from bench.timers import Call
from pars_fast.bench_results import NOT_MEASURED, ROOT, machine, read_csv
from pars_fast.cli import main
from pars_fast.packed_weights import PackedWeights
from pars_fast.tokenization import pack

from .conftest import MakeReport
from .test_suite import tiny_ranker

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(all_cases())


def test_every_case_is_listed(cases: list[Case]) -> None:
    assert Counter(case.op for case in cases) >= Counter(
        {
            "peak_copy": 1,
            "peak_matmul": 1,
            "score": 40,
            "queue_topk": 32,
            "device_order": 4,
            "decode_step": 5,
            "arrival_to_order": 1,
        }
    )
    scored = {
        (case.provider, case.shape["model"], case.shape["prompts"], case.shape["l2"])
        for case in cases
        if case.op == "score"
    }
    for provider in gpu_providers.PROVIDERS:
        for model in ("MiniLM-L6", "bert-base"):
            assert {(provider, model, 1, "warm"), (provider, model, 1, "flushed")} <= scored
            assert {(provider, model, prompts, "flushed") for prompts in (8, 32, 256)} <= scored


def test_cases_are_named_apart(cases: list[Case]) -> None:
    names = Counter(case.row(None).case for case in cases)
    assert [name for name, count in names.items() if count > 1] == []


def test_work_is_the_same_for_all_providers(cases: list[Case]) -> None:
    work = {(case.op, case.provider, str(case.shape)): (case.bytes_moved, case.flops) for case in cases}
    for (op, _, shape), figures in work.items():
        assert figures == next(value for key, value in work.items() if (key[0], key[2]) == (op, shape))


@needs_no_gpu
def test_the_command_marks_all_as_not_measured(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.csv"
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--csv", str(path)])
    assert gpu.main() == 0
    assert f"no GPU: {len(cases)} cases marked as not measured" in capsys.readouterr().out
    with path.open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(cases)
    assert {record[f"time_us_{quantile}"] for record in records for quantile in ("p20", "p50", "p80")} == {
        NOT_MEASURED
    }
    assert all(
        record["op"] and record["provider"] and record["versions"] and record["cpu"] for record in records
    )
    assert [row.case for row in read_csv(path).rows] == [case.row(None).case for case in cases]


def test_the_committed_file_lists_every_case(cases: list[Case]) -> None:
    rows = read_csv(ROOT / "bench" / "results" / "gpu.csv").rows
    assert [row.case for row in rows] == [case.row(None).case for case in cases], "run `make bench-gpu`"


def test_a_case_that_fails_costs_no_other_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Call:
        raise RuntimeError("no such kernel")

    def clock(call: Call) -> tuple[float, float, float]:
        assert call() == 7
        return 1.0, 2.0, 3.0

    both = [
        Case("score", "a", {"prompts": 1}, fail),
        Case("score", "b", {"prompts": 1}, lambda: lambda: 7, timer=clock),
    ]
    monkeypatch.setattr(gpu, "all_cases", lambda: iter(both))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "gpu.csv"
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--csv", str(path)])
    assert gpu.main() == 1
    assert "not measured: score, a, {'prompts': 1}: RuntimeError('no such kernel')" in capsys.readouterr().err
    assert [row.time_us for row in read_csv(path).rows] == [None, (1.0, 2.0, 3.0)]


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Op by op, or after it was cut off: what the file has from this machine and commit is not run again."""
    ran: list[str] = []

    def case(op: str, provider: str) -> Case:
        name = f"{op} {provider}"
        return Case(op, provider, {"prompts": 1}, lambda: lambda: ran.append(name), timer=clock)

    def clock(call: Call) -> tuple[float, float, float]:
        call()
        if ran[-1] == stop_at:
            raise KeyboardInterrupt
        return 1.0, 2.0, 3.0

    cases = [case("score", "torch_compile_bucketed"), case("score", "ours"), case("top", "ours")]
    monkeypatch.setattr(gpu, "all_cases", lambda: iter(cases))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "gpu.csv"

    def run(*options: str) -> list[str]:
        ran.clear()
        monkeypatch.setattr("sys.argv", ["bench.gpu", "--csv", str(path), *options])
        assert gpu.main() == 0
        return list(ran)

    stop_at = ""
    assert run("--only", "top") == ["top ours"]
    stop_at = "score torch_compile_bucketed"
    with pytest.raises(KeyboardInterrupt):
        run()
    assert ran == ["score ours", "score torch_compile_bucketed"]  # what compiles for minutes comes last
    stop_at = ""
    assert run() == ["score torch_compile_bucketed"]
    assert [row.case for row in read_csv(path).rows] == [case.row(None).case for case in cases]
    monkeypatch.setattr(gpu, "machine", lambda threads: machine(threads) | {"commit": "another"})
    assert len(run()) == 3


def test_an_op_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--csv", str(tmp_path / "gpu.csv"), "--only", "sort"])
    assert gpu.main() == 1
    assert "no op of sort; there are: peak_copy, peak_matmul, score, queue_topk" in capsys.readouterr().err


def test_the_command_gives_the_suite_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_report: MakeReport
) -> None:
    ran: list[list[str]] = []

    class Done:
        returncode = 1

    def run(command: list[str], **_: object) -> Done:
        ran.append(command)
        return Done()

    monkeypatch.setattr("pars_fast.bench_table.subprocess.run", run)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "gpu", "--csv", "gpu.csv", "--only", "score"]) == 1
    assert ran[0][-4:] == ["--csv", str(tmp_path / "gpu.csv"), "--only", "score"]


def test_buckets_hold_every_prompt_once() -> None:
    ids = [[1] * length for length in (16, 17, 1, 128, 96, 512)]
    filled = gpu_providers.buckets(ids)
    assert [[len(prompt) for prompt in bucket] for bucket in filled] == [[16, 1], [17], [96], [128], [512]]
    with pytest.raises(ValueError, match="prompts must have at most 512 tokens, got 513"):
        gpu_providers.buckets([[1] * 513])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_unpadded_baseline_scores_as_the_ranker(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but FlashAttention of variable length, which needs a GPU and stands here as attention by prompt."""
    ranker = tiny_ranker("cls" if pooling == "cls" else "mean")
    ids = [[2, 4, 5, 6, 3], [2, 3], [2, 9, 3]]
    batch = pack(ids)

    def attention(
        qkv: torch.Tensor, num_heads: int, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        assert max_seqlen == 5
        parts = []
        for prompt in qkv.split(cu_seqlens.diff().tolist()):
            q, k, v = prompt.view(len(prompt), 3, num_heads, -1).permute(1, 2, 0, 3)
            context = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            parts.append(context.transpose(0, 1).reshape(len(prompt), -1))
        return torch.cat(parts)

    monkeypatch.setattr(gpu_providers, "_varlen_attention", attention)
    weights = PackedWeights.from_model(ranker.model)
    positions = gpu_providers.Positions.of(ids, torch.device("cpu"))
    with torch.inference_mode():
        scores = gpu_providers.varlen_scores(weights, batch, positions, 5)
        expected = ranker.model(batch.input_ids, batch.cu_seqlens)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
