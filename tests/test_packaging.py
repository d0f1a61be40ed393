"""The wheel, built from the sdist and used from another folder."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("build")

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = (".*", "__pycache__", "*.egg-info", "build", "dist", "out", "tests", "bench")


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command; its error output is shown if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing is left in the repository and no old `build/` gets in."""
    source, out = tmp_path_factory.mktemp("source") / "pars-fast", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_PACKAGED))
    isolation = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    run(sys.executable, "-m", "build", *isolation, "--outdir", str(out), cwd=source)
    assert list(out.glob("*.tar.gz"))
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path


def packaged_files() -> set[str]:
    """Files under pars_fast/, its two links followed."""
    return {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "pars_fast", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == packaged_files()


def test_the_wheel_says_how_vllm_finds_the_plugin(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    entry_points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert entry_points["vllm.general_plugins", "pars_fast"] == "pars_fast.integration.plugin:register"
    assert entry_points["console_scripts", "pars-fast"] == "pars_fast.cli:main"
    assert distribution.metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vllm")
def test_every_module_imports_from_the_wheel(installed: Path, elsewhere: Path) -> None:
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in packaged_files()
        if name.endswith(".py")
    }
    assert {
        "pars_fast.kernels.pool_score",
        "pars_fast.integration.scheduler",
        "pars_fast.demo.run",
    } <= modules
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    )  # fmt: skip
    files = run(
        sys.executable,
        "-c",
        code,
        *sorted(modules),
        cwd=elsewhere,
        PYTHONPATH=str(installed),
        TRITON_INTERPRET="1",
    ).splitlines()
    assert len([file for file in files if file.startswith(str(installed))]) == len(modules)


@pytest.mark.parametrize("module", ["pars_fast", "pars_fast.integration.plugin", "pars_fast.cli"])
def test_what_every_vllm_process_imports_is_light(installed: Path, elsewhere: Path, module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print(*sorted({'torch', 'transformers', 'vllm', 'triton'} & set(sys.modules)))"
    )  # fmt: skip
    assert run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(installed)).strip() == ""
