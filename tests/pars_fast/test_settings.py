"""Settings: defaults, what is taken, and messages that say how to mend a wrong value."""

from dataclasses import fields
from pathlib import Path

import pytest

from pars_fast.errors import SettingsError
from pars_fast.guards import FixedThreshold, IdleQuantum, NoGuard, PassingLimit, RelativeAgeing, UniBoost
from pars_fast.policies import POLICIES
from pars_fast.settings import INTERNAL_VARIABLES, Settings


def test_defaults() -> None:
    assert Settings.from_environ({}) == Settings(
        enable=False,
        ranker="auto",
        policy="pars_fast",
        mode="on",
        guard=None,
        guard_beta=0.5,
        guard_floor_requests=0.0,
        trust_caller=False,
        chat_template=None,
        device="auto",
        cpu_threads=1,
        gpu_sms=16,
        stale_after_s=5.0,
        calibration=True,
        min_tau=0.1,
        log_every_s=30.0,
        record=None,
        record_prompts="hashed",
        force=False,
    )


def test_every_setting_is_read_from_its_variable(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.touch()
    environ = {
        "PARS_ENABLE": "1",
        "PARS_RANKER": str(tmp_path),
        "PARS_POLICY": "oracle",
        "PARS_MODE": "shadow",
        "PARS_GUARD_BETA": "2",
        "PARS_GUARD_FLOOR_REQUESTS": "1e3",
        "PARS_TRUST_CALLER": "1",
        "PARS_CHAT_TEMPLATE": str(template),
        "PARS_DEVICE": "cpu",
        "PARS_CPU_THREADS": "3",
        "PARS_GPU_SMS": "0",
        "PARS_STALE_AFTER_S": "0.5",
        "PARS_CALIBRATION": "0",
        "PARS_MIN_TAU": "-1",
        "PARS_LOG_EVERY_S": "0",
        "PARS_RECORD": str(tmp_path / "lengths.jsonl"),
        "PARS_RECORD_PROMPTS": "plain",
        "PARS_FORCE": "1",
    }
    elsewhere = {"PARS_GUARD", "PARS_DEMAND"}
    assert environ.keys() | elsewhere == {f.metadata["variable"] for f in fields(Settings)}
    assert Settings.from_environ(environ) == Settings(
        True, str(tmp_path), "oracle", "shadow", None, 2.0, 1000.0, True, template, "cpu", 3, 0, 0.5, False,
        -1.0, 0.0, tmp_path / "lengths.jsonl", "plain", True,
    )


def test_a_guard_by_name_with_settings() -> None:
    settings = Settings.from_environ({"PARS_GUARD": "fixed_threshold:seconds=60"})
    assert {settings.guard_of(policy()) for policy in POLICIES.values()} == {FixedThreshold(60.0)}


def test_without_a_guard_asked_for_each_policy_has_its_own() -> None:
    settings = Settings.from_environ({"PARS_GUARD_BETA": "2", "PARS_GUARD_FLOOR_REQUESTS": "7"})
    guards = {name: settings.guard_of(policy()) for name, policy in POLICIES.items()}
    assert {name: guard for name, guard in guards.items() if guard != NoGuard()} == {
        "pars": FixedThreshold(120.0),
        "pars_fast": PassingLimit(2.0, 7.0),
        "ltr": IdleQuantum(200, 10),
        "relative_ageing": RelativeAgeing(),
        "uniboost": UniBoost(),
    }


@pytest.mark.parametrize("variable", ["PARS_GUARD_BETA", "PARS_GUARD_FLOOR_REQUESTS"])
def test_settings_of_the_default_guard_beside_another_are_refused(variable: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable} is a setting of the default guard, and PARS_GUARD"):
        Settings.from_environ({variable: "1", "PARS_GUARD": "none"})


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PARS_ENABLE", "yes", "0 or 1"),
        ("PARS_RANKER", "/no/such/folder", "auto, default, small or an existing directory"),
        ("PARS_RECORD", "/no/such/folder/lengths.jsonl", "a file in a folder that can be written to"),
        ("PARS_MIN_TAU", "-2", "a number >= -1"),
        ("PARS_POLICY", "sjf", "one of fcfs, priority, prompt_length, oracle, srpt, pars, pars_fast"),
        ("PARS_MODE", "off", "one of on, shadow"),
        ("PARS_GUARD", "patience", "one of none, fixed_threshold, idle_quantum, relative_ageing, uniboost, "),
        ("PARS_GUARD", "none:seconds=1", "none with no settings, not 'seconds'"),
        ("PARS_GUARD", "fixed_threshold:beta=1", "fixed_threshold with seconds, not 'beta'"),
        ("PARS_GUARD", "uniboost:knob=high", "uniboost with knob as a number, not 'high'"),
        ("PARS_GUARD", "idle_quantum:idle_steps=0", "idle_quantum with another value: idle_steps must be"),
        ("PARS_GUARD_BETA", "-0.1", "a number >= 0"),
        ("PARS_GUARD_BETA", "nan", "a number >= 0"),
        ("PARS_GUARD_BETA", "inf", "a number >= 0"),
        ("PARS_GUARD_FLOOR_REQUESTS", "many", "a number >= 0"),
        ("PARS_TRUST_CALLER", "true", "0 or 1"),
        ("PARS_CHAT_TEMPLATE", "/no/such/folder/chat.jinja", "a file that can be read"),
        ("PARS_DEVICE", "tpu", "one of auto, cpu, cuda"),
        ("PARS_CPU_THREADS", "0", "a number of threads, a whole number >= 1"),
        ("PARS_CPU_THREADS", "1.5", "a number of threads, a whole number >= 1"),
        ("PARS_GPU_SMS", "-1", "a number of SMs, a whole number >= 0"),
        ("PARS_STALE_AFTER_S", "0", "seconds >= 0.1"),
        ("PARS_FORCE", "2", "0 or 1"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.from_environ({variable: value})
    assert f"{variable}={value!r} is not allowed: expected {allowed}" in str(raised.value)


def test_a_typo_in_a_variable_name_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"PARS_POLICI is no setting of pars-fast; there are: PARS_ENABLE, "
    ):
        Settings.from_environ({"PARS_POLICI": "fcfs"})


def test_empty_and_foreign_variables_are_left_alone() -> None:
    assert Settings.from_environ({"PARS_POLICY": "", "HOME": "/", "PARSER": "x"}) == Settings()


@pytest.mark.parametrize("variable", sorted(INTERNAL_VARIABLES))
def test_internal_variables_are_no_typo(variable: str) -> None:
    assert Settings.from_environ({variable: "/tmp"}) == Settings()


def test_the_docstring_names_every_variable() -> None:
    documented = Settings.__doc__ or ""
    assert [
        f.name for f in fields(Settings) if f"{f.name}: {f.metadata['variable']}." not in documented
    ] == []
