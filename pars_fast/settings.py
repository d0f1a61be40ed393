"""Every setting of the vLLM integration, read from `PARS_*` environment variables."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pars_fast.errors import DataError, SettingsError
from pars_fast.guards import Guard, PassingLimit, parse_guard
from pars_fast.packaged import AUTO, PACKAGED
from pars_fast.policies import POLICIES, Policy
from pars_fast.policies.demand import load_demand
from pars_fast.policies.justitia import Justitia


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return parse


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def _number(low: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{what} >= {low:g}")
        return value

    return parse


def _whole(low: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise ValueError(f"{what}, a whole number >= {low}")
        return int(text)

    return parse


def _file_to_append(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError("a file in a folder that can be written to")
    return path


def _file_to_read(text: str) -> Path:
    path = Path(text)
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError("a file that can be read")
    return path


def _demand_file(text: str) -> Path:
    try:
        load_demand(Path(text))
    except DataError as error:
        raise ValueError(f"a file of `pars-fast fairness demand` ({error})") from None
    return Path(text)


def _setting(variable: str, default: Any, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"variable": variable, "parse": parse})


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one vLLM process; a wrong value stops the start and names its variable.

    Attributes:
        enable: PARS_ENABLE. 1 ranks the waiting queue, 0 (default) leaves vLLM as it is.
        ranker: PARS_RANKER. Ranker directory, or `default` or `small`, which are in the package; `auto`
            (default) is `default` on a GPU and `small` on a CPU.
        policy: PARS_POLICY. `pars_fast` (default), `pars`, `relative_ageing`, `uniboost`, `tie`,
            `gittins`, `cost_aware`, `prompt_length`, `priority`, `fcfs`; `ltr`, `elis` and `alise`, which
            preempt running requests; `justitia` or `vtc`, which share the engine; `oracle` and `srpt`, which
            read `max_tokens`, for replays (`docs/policies.md`).
        mode: PARS_MODE. `on` (default), or `shadow`: score and log, keep arrival order.
        guard: PARS_GUARD. Bounds the order in place of the policy's own guard: `none`, `fixed_threshold`,
            `idle_quantum`, `relative_ageing`, `uniboost`, `overtaking_budget` or `passing_limit`, each with
            its settings, such as `fixed_threshold:seconds=60` (see `pars_fast.guards`).
        guard_beta: PARS_GUARD_BETA. Of the default guard, the passing limit: passing tolerated per request
            of the longest queue since, ratio.
        guard_floor_requests: PARS_GUARD_FLOOR_REQUESTS. Of the default guard: requests by which every one
            may be passed in any case.
        trust_caller: PARS_TRUST_CALLER. 1 takes `vllm_xargs: {"pars_score": tokens}` of a request.
        chat_template: PARS_CHAT_TEMPLATE. File of the server's `--chat-template`, if it has one: what a
            template writes around messages is no part of what the ranker reads. None: the tokenizer's own.
        device: PARS_DEVICE. `auto` (default): the GPU when one process has it alone, else the CPU.
        cpu_threads: PARS_CPU_THREADS. Threads of the ranker's process on the CPU.
        gpu_sms: PARS_GPU_SMS. SMs that the ranker takes at most, on a GPU shared with decode; 0: all.
        stale_after_s: PARS_STALE_AFTER_S. A ranker silent for so long with work in hand counts as hung;
            the order falls back to arrival and the ranker is started anew.
        calibration: PARS_CALIBRATION. 1 (default) watches how scores order real lengths, switches ranking off
            and on by it and keeps the scale of expected tokens right; 0 trusts the ranker.
        min_tau: PARS_MIN_TAU. Ranking is off while Kendall's tau-b is surely below it.
        log_every_s: PARS_LOG_EVERY_S. A line with the state is logged so often while requests are left
            waiting; 0: never.
        record: PARS_RECORD. File to which finished requests' prompts and lengths are appended; None: none.
        record_prompts: PARS_RECORD_PROMPTS. `hashed` (default), or `plain`, which can be trained on.
        force: PARS_FORCE. 1 ranks on a vLLM version that was not tested, too.
        demand: PARS_DEMAND. Of `justitia`: file of `pars-fast fairness demand`; None: every application
            counts as one request of 256 output tokens.
    """

    enable: bool = _setting("PARS_ENABLE", False, _flag)
    ranker: str = _setting("PARS_RANKER", AUTO, str)
    policy: str = _setting("PARS_POLICY", "pars_fast", _choice(*POLICIES))
    mode: str = _setting("PARS_MODE", "on", _choice("on", "shadow"))
    guard: Guard | None = _setting("PARS_GUARD", None, parse_guard)  # noqa: RUF009
    guard_beta: float = _setting("PARS_GUARD_BETA", 0.5, _number(0, "a number"))
    guard_floor_requests: float = _setting("PARS_GUARD_FLOOR_REQUESTS", 0.0, _number(0, "a number"))
    trust_caller: bool = _setting("PARS_TRUST_CALLER", False, _flag)
    chat_template: Path | None = _setting("PARS_CHAT_TEMPLATE", None, _file_to_read)  # noqa: RUF009
    device: str = _setting("PARS_DEVICE", "auto", _choice("auto", "cpu", "cuda"))
    cpu_threads: int = _setting("PARS_CPU_THREADS", 1, _whole(1, "a number of threads"))
    gpu_sms: int = _setting("PARS_GPU_SMS", 16, _whole(0, "a number of SMs"))
    stale_after_s: float = _setting("PARS_STALE_AFTER_S", 5.0, _number(0.1, "seconds"))
    calibration: bool = _setting("PARS_CALIBRATION", True, _flag)
    min_tau: float = _setting("PARS_MIN_TAU", 0.1, _number(-1, "a number"))
    log_every_s: float = _setting("PARS_LOG_EVERY_S", 30.0, _number(0, "seconds"))
    record: Path | None = _setting("PARS_RECORD", None, _file_to_append)  # noqa: RUF009
    record_prompts: str = _setting("PARS_RECORD_PROMPTS", "hashed", _choice("hashed", "plain"))
    force: bool = _setting("PARS_FORCE", False, _flag)
    demand: Path | None = _setting("PARS_DEMAND", None, _demand_file)  # noqa: RUF009

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the environment.

        Raises: SettingsError: for a value that is not allowed, a ranker directory that is not there, or a
            `PARS_` variable that no setting has (a typo would silently do nothing).
        """
        known = {f.metadata["variable"]: f for f in fields(cls)}
        unknown = sorted(name for name in environ if name.startswith("PARS_") and name not in known)
        unknown = [name for name in unknown if name not in INTERNAL_VARIABLES]
        if unknown:
            raise SettingsError(f"{unknown[0]} is no setting of pars-fast; there are: {', '.join(known)}")
        values: dict[str, Any] = {}
        for variable, f in known.items():
            text = environ.get(variable, "")
            if not text:
                continue
            try:
                values[f.name] = f.metadata["parse"](text)
            except ValueError as error:
                raise SettingsError(f"{variable}={text!r} is not allowed: expected {error}") from None
        if "guard" in values and (both := [name for name in _DEFAULT_GUARD if environ.get(name)]):
            raise SettingsError(f"{both[0]} is a setting of the default guard, and PARS_GUARD names one: "
                                "give it there, as in passing_limit:beta=0.5,floor_requests=0")
        settings = cls(**values)
        if reason := POLICIES[settings.policy].not_live:
            raise SettingsError(f"PARS_POLICY={settings.policy} is not for a live engine: {reason}")
        if settings.ranker not in (AUTO, *PACKAGED) and not Path(settings.ranker).is_dir():
            names = ", ".join((AUTO, *PACKAGED))
            raise SettingsError(
                f"PARS_RANKER={settings.ranker!r} is not allowed: expected {names} or an existing directory"
            )
        return settings

    def make_policy(self) -> Policy:
        """The policy asked for, with what it reads from a file."""
        if self.policy == "justitia" and self.demand is not None:
            return Justitia(load_demand(self.demand))
        return POLICIES[self.policy]()

    def guard_of(self, policy: Policy) -> Guard:
        """The guard that bounds `policy`: the one asked for, or the policy's own."""
        if self.guard is not None:
            return self.guard
        if isinstance(policy.default_guard, PassingLimit):
            return PassingLimit(self.guard_beta, self.guard_floor_requests)
        return policy.default_guard


_DEFAULT_GUARD = ("PARS_GUARD_BETA", "PARS_GUARD_FLOOR_REQUESTS")
# Not for users.
INTERNAL_VARIABLES = frozenset({"PARS_METRICS_DIR", "PARS_DEMO_POLICY_FILE", "PARS_STEP_LOG"})
