"""vLLM's own scheduler tests against the ranked scheduler: `make conformance VLLM=0.32.0`.

    python -m tests.conformance.run --vllm 0.32.0

Takes `tests/v1` from vLLM's source archive, which `pip download` fetches, and runs the scheduler's tests and
the KV connectors' three times: stock, ranked with scores in order of arrival, ranked with scores reversed.
A test that stock fails (for want of a model or a GPU) says nothing. Of the others none may fail in order of
arrival, and with scores reversed only those in `expected_failures.json`, each with its reason: they assert
the order of arrival itself. `not_ours` in that file names tests that are run on no scheduler of ours. The
outcome is in `out/conformance/VERSION/report.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# In vLLM's `tests/`: what drives the scheduler, and the KV connectors' scheduler side.
TESTS = (
    "v1/core/test_scheduler.py",
    "v1/core/test_async_scheduler.py",
    "v1/core/test_priority_preemption_bug.py",
    "v1/core/test_priority_scheduler_random.py",
    "v1/core/test_deferred_block_free.py",
    "v1/core/test_prefix_replay.py",
    "v1/core/test_repetition_detection.py",
    "v1/core/test_swa_inflight_window_free.py",
    "v1/core/test_worker_slot_overflow.py",
    "v1/kv_connector/unit/test_cache_pollution_prevention.py",
    "v1/kv_connector/unit/test_error_propagation.py",
    "v1/kv_connector/unit/test_invalid_blocks_correctness.py",
    "v1/kv_connector/unit/test_kv_connector_lifecycle.py",
    "v1/kv_connector/unit/test_kv_load_failure_recovery.py",
    "v1/kv_connector/unit/test_remote_decode_lifecycle.py",
    "v1/kv_connector/unit/test_remote_prefill_lifecycle.py",
)
# Models that vLLM's tests name; of each only the configuration is read, so its published sizes are enough.
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "max_position_embeddings": 2048,
    "vocab_size": 50272, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": "float16",
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "ffn_dim": 3072,
}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "facebook/opt-125m": OPT,
    "facebook/opt-350m": OPT | {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024,
                                "ffn_dim": 4096, "word_embed_proj_dim": 512},
}  # fmt: skip
Outcomes = dict[str, str]  # passed, failed, skipped by test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm", required=True, help="version whose tests are run; it must be installed")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "out" / "conformance")
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.vllm
    unpack(arguments.vllm, folder)
    minor = arguments.vllm.rpartition(".")[0]
    known = json.loads((HERE / "expected_failures.json").read_text()).get(minor, {})
    not_ours, order = set(known.get("not_ours", ())), set(known.get("reversed", ()))
    stock = run(folder, None)[0]
    report: dict[str, object] = {"vllm": arguments.vllm, "stock": count(stock)}
    wrong = False
    for scores, allowed in (("arrival", not_ours), ("reversed", not_ours | order)):
        outcomes, popped = run(folder, scores)
        failed = sorted(test for test, outcome in stock.items()
                        if outcome == "passed" and outcomes.get(test) != "passed")
        unexpected = [test for test in failed if base(test) not in allowed]
        report[scores] = {"outcomes": count(outcomes), "popped_from_our_queue": popped, "failed": failed,
                          "unexpected": unexpected}
        wrong |= bool(unexpected) or popped == 0
    text = json.dumps(report, indent=2)
    print(text)
    (folder / "report.json").write_text(text + "\n")
    return int(wrong)


def base(test: str) -> str:
    """A test's name without its parameters."""
    return test.partition("[")[0]


def count(outcomes: Mapping[str, str]) -> dict[str, int]:
    """How many tests came out in each way."""
    values = list(outcomes.values())
    return {value: values.count(value) for value in sorted(set(values))}


def unpack(version: str, folder: Path) -> None:
    """Put the needed part of vLLM's `tests/` into `folder`, without its conftest, which needs much else."""
    if (folder / "tests").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # To name the version, setup.py is run: with these two it builds nothing.
    environment = os.environ | {"VLLM_VERSION_OVERRIDE": version, "VLLM_TARGET_DEVICE": "empty"}
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"vllm=={version}"]
    subprocess.run(command, check=True, env=environment)
    with tarfile.open(folder / f"vllm-{version}.tar.gz") as archive:
        archive.extractall(folder, members=_members(archive), filter="data")
    shutil.move(folder / f"vllm-{version}" / "tests", folder / "tests")
    for name, config in MODELS.items():
        _write_model(folder / "hub", name, config)


def _members(archive: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    for member in archive:
        path = member.name.partition("/")[2]
        wanted = ("tests/v1/core/", "tests/v1/kv_connector/", "tests/v1/ec_connector/")
        if path.startswith(wanted) or path in ("tests/__init__.py", "tests/v1/__init__.py", "tests/utils.py"):
            yield member


def _write_model(hub: Path, name: str, config: Mapping[str, object]) -> None:
    """A model with nothing but a configuration, as Hugging Face's cache keeps it."""
    model = hub / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))


def run(folder: Path, scores: str | None) -> tuple[Outcomes, int]:
    """(outcome of each test, requests popped from our queue) of one run; stock without `scores`."""
    name = scores or "stock"
    results, pops = folder / f"{name}.xml", folder / f"{name}.pops"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PARS_")}
    environment |= {
        "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "CONFORMANCE_POPS": str(pops),
        "PYTHONPATH": os.pathsep.join((str(folder), str(REPOSITORY / "tests" / "conformance"),
                                       str(REPOSITORY))),
    }  # fmt: skip
    if scores:
        environment["CONFORMANCE_SCORES"] = scores
    tests = [f"tests/{test}" for test in TESTS if (folder / "tests" / test).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ranked_schedulers", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", "--rootdir", str(folder), "--tb=line",
               f"--junitxml={results}", *tests]
    with (folder / f"{name}.log").open("wb") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return outcomes_of(results), int(pops.read_text())


def outcomes_of(junit: Path) -> Outcomes:
    """{module::test: outcome} of a file as `--junitxml` writes it."""
    outcomes = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
