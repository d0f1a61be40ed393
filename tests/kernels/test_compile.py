"""Every kernel compiles for the GPUs we support, without one, and spills no register."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot_compile import ARCHES, RESULTS, cases

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "_attention_kernel", "_embed_layer_norm_kernel", "_linear_kernel", "_linear_layer_norm_kernel",
    "_residual_layer_norm_kernel",
    "_pool_score_kernel", "_queue_topk_tile_kernel", "_queue_topk_merge_kernel", "_queue_topk_locate_kernel",
    "_small_batch_score_kernel",
    "_slot_update_kernel", "_publish_score_kernel",
}  # fmt: skip
# What a block may ask for: 99 KB on sm_86 and sm_89, which run code made for sm_80; 227 KB from sm_90 on.
MAX_SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Compiled in a process of its own: in this one the interpreter may stand in for the compiler."""
    path = tmp_path_factory.mktemp("aot") / "aot_compile.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot_compile", "--first-shapes", "--csv", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    return read(path)


def test_every_kernel_compiles_for_every_architecture(compiled: list[dict[str, str]]) -> None:
    assert {(row["kernel"], row["arch"]) for row in compiled} == {(k, a) for k in KERNELS for a in ARCHES}


def test_no_kernel_of_the_project_is_left_out() -> None:
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    named = {line.split("(")[0].removeprefix("def ") for text in sources for line in text.splitlines()
             if line.startswith("def _") and "_kernel(" in line}  # fmt: skip
    assert named == KERNELS


def test_nothing_spills_and_shared_memory_suffices(compiled: list[dict[str, str]]) -> None:
    for row in [*compiled, *read(RESULTS)]:
        spilled = row["spill_store_bytes"], row["spill_load_bytes"], row["stack_bytes"]
        assert spilled == ("0", "0", "0"), row
        assert int(row["shared_bytes"]) <= MAX_SHARED_BYTES[row["arch"]], row


def test_the_published_table_has_every_case() -> None:
    published = [(row["kernel"], row["shape"], row["arch"]) for row in read(RESULTS)]
    wanted = [(case.kernel.__name__, case.shape, arch) for case in cases() for arch in ARCHES]
    assert published == wanted, "remake it: python -m bench.aot_compile"


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-m", "bench.aot_compile", "--csv", os.devnull]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "TRITON_INTERPRET is set" in run.stderr
