"""The plug-in as vLLM loads it. Each case is a fresh process: a plug-in changes the process it is in."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from pars_fast.integration.plugin import TESTED_VLLM

SHOW_HEAVY_IMPORTS = """
import sys
from pars_fast.integration.plugin import register
register()
print(sorted({"torch", "vllm", "numpy", "prometheus_client"} & set(sys.modules)))
"""

SHOW_SCHEDULERS = """
import functools, json, os, tempfile, vllm
from prometheus_client import generate_latest
from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.plugin import register
from vllm.config.scheduler import SchedulerConfig

def schedulers(**environ):
    os.environ.update(environ)
    register()
    common = {"max_model_len": 64, "is_encoder_decoder": False}
    configs = [SchedulerConfig(**common, async_scheduling=value) for value in (False, True)]
    return [config.get_scheduler_cls().__name__ for config in configs]

original = SchedulerConfig.get_scheduler_cls

@functools.wraps(original)
def of_another_plug_in(self):
    return original(self)

SchedulerConfig.get_scheduler_cls = of_another_plug_in
tested, vllm.__version__ = vllm.__version__, "0.99.1"
shown = {
    "unset": schedulers(),
    "off": schedulers(PARS_ENABLE="0"),
    "unknown version": schedulers(PARS_ENABLE="1"),
    "forced": schedulers(PARS_FORCE="1"),
}
vllm.__version__ = tested
shown["again"] = schedulers(PARS_FORCE="0")
shown["wrapped twice"] = SchedulerConfig.get_scheduler_cls.__wrapped__ is not of_another_plug_in

def times_shown():
    return generate_latest(get_prometheus_registry()).decode().count('pars_active{engine="3"} ')

from vllm.v1.metrics.prometheus import get_prometheus_registry
CounterFile(os.environ["PARS_METRICS_DIR"], 3)
shown["on /metrics"] = times_shown()
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()  # as with several API servers
shown["on /metrics of several"] = times_shown()
print(json.dumps(shown))
"""


def python(code: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PARS_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=inherited | environ, capture_output=True, text=True, timeout=240)


def test_it_is_registered_with_vllm() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="pars_fast")
    assert entry.value == "pars_fast.integration.plugin:register"


def test_unset_it_imports_nothing() -> None:
    result = python(SHOW_HEAVY_IMPORTS)
    assert result.stdout.splitlines() == ["[]"], result.stderr


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PARS_ENABLE": "yes"}, "PARS_ENABLE='yes' is not allowed: expected 0 or 1"),
        (
            {"PARS_ENABLE": "1", "PARS_MODE": "maybe"},
            "PARS_MODE='maybe' is not allowed: expected one of on, shadow",
        ),
        ({"PARS_ENABLE": "1", "PARS_POLICE": "x"}, "PARS_POLICE is no setting of pars-fast"),
    ],
    ids=["enable", "mode", "typo"],
)
def test_a_wrong_value_stops_the_process(environ: dict[str, str], message: str) -> None:
    result = python(SHOW_HEAVY_IMPORTS, **environ)
    assert result.returncode != 0
    assert message in result.stderr


def test_the_scheduler_is_wrapped_once_and_only_if_asked_to() -> None:
    """And so are the metrics; another plug-in has wrapped it before. One process goes through all cases,
    since each takes vLLM's import; none undoes a wrapping."""
    result = python(SHOW_SCHEDULERS)
    assert result.returncode == 0, result.stderr
    stock, ranked = ["Scheduler", "AsyncScheduler"], ["RankedScheduler", "RankedAsyncScheduler"]
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "unset": stock,
        "off": stock,
        "unknown version": stock,
        "forced": ranked,
        "again": ranked,
        "wrapped twice": False,
        "on /metrics": 1,
        "on /metrics of several": 1,
    }
    warning = f"pars-fast is tested with vLLM {', '.join(TESTED_VLLM)}, not 0.99.1"
    assert (result.stdout + result.stderr).count(warning) == 1
