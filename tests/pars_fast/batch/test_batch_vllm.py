"""The batch job on a real vLLM: killed, resumed, and compared with plain `LLM.generate`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

pytest.importorskip("vllm")

from pars_fast.cli import main
from pars_fast.demo.model import make_tiny_model

PROMPTS = [f"Question {number}: " + "say more " * (number % 5) for number in range(24)] + [
    "Question 3: again"
]
MAX_TOKENS = 120
ENGINE = {"enforce_eager": True, "max_num_seqs": 8, "max_model_len": 512, "dtype": "float32"}
PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
model, engine, prompts, max_tokens, out = json.load(sys.stdin)
outputs = LLM(model, **engine).generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
rows = [[output.outputs[0].text, output.outputs[0].finish_reason] for output in outputs]
json.dump(rows, open(out, "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that ends many of its answers by itself, and the prompts."""
    folder = tmp_path_factory.mktemp("batch")
    make_tiny_model(folder / "model", PROMPTS)
    model = Qwen2ForCausalLM.from_pretrained(folder / "model", tie_word_embeddings=False)
    with torch.no_grad():  # with tied embeddings every answer repeats the prompt's last token
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "model")
    endings = {"eos_token_id": list(range(0, 4096, 48))}
    (folder / "model" / "generation_config.json").write_text(json.dumps(endings))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def environment() -> dict[str, str]:
    """Engines in the job's own process, which start sooner."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PARS_", "TRITON_INTERPRET"))
    }
    return {**kept, **variables, "PYTHONPATH": str(Path(__file__).parents[3])}


def start(folder: Path, lengths: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "pars_fast.cli",
        "batch",
        "--prompts",
        "prompts.txt",
        "--out",
        "out.jsonl",
    ]
    options = [
        "--model",
        "model",
        "--max-tokens",
        str(MAX_TOKENS),
        "--lengths",
        lengths,
        "--ranker",
        "small",
        "--batch-tokens",
        "2000",
        "--engine",
        json.dumps(ENGINE),
    ]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kept(folder: Path) -> int:
    import sqlite3

    path = folder / "out.jsonl.sqlite"
    if not path.exists():
        return 0
    try:
        return int(sqlite3.connect(path).execute("SELECT count(*) FROM completions").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0


def test_a_job_that_is_killed_ends_as_plain_generate_does(folder: Path) -> None:
    first = start(folder, "ranker")
    deadline = time.monotonic() + 300
    while not kept(folder) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    output, _ = first.communicate()
    done = kept(folder)
    assert done > 0, output

    second = start(folder, "perception")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert f"{done} of {len(PROMPTS)} were there" in output or done == len(PROMPTS)
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt.strip() for prompt in PROMPTS]

    job = json.dumps(["model", ENGINE, [row["prompt"] for row in rows], MAX_TOKENS, "plain.json"])
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=job,
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert plain.returncode == 0, plain.stderr
    expected = json.loads((folder / "plain.json").read_text())
    assert [[row["text"], row["finish_reason"]] for row in rows] == expected
    assert {reason for _, reason in expected} == {"stop", "length"}  # both ways of ending are in it


@pytest.mark.parametrize("engine", [{"max_num_seq": 64}, {"dtype": "float7"}], ids=str)
def test_arguments_that_vllm_refuses_are_named(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], engine: dict[str, object]
) -> None:
    files = ["--prompts", str(folder / "prompts.txt"), "--out", str(tmp_path / "out.jsonl")]
    command = ["batch", *files, "--model", str(folder / "model"), "--engine", json.dumps(engine)]
    assert main(command) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("pars-fast: error: vLLM refuses --model or --engine: ")
    assert next(iter(engine)) in error
