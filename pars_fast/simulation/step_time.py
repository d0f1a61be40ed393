"""How long one engine step takes: a linear model, and named profiles with their sources.

The step of an engine reads all weights once (`base_s`), computes prompt tokens (`prefill_token_s`), makes
one token for each decoding request (`decode_seq_s`), and reads the KV cache of what was computed before
(`kv_token_s`). Only published figures are named here; those of a machine at hand come from `pars-fast
profile`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from pars_fast.errors import DataError
from pars_fast.simulation.engine import EngineSettings


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one engine step: `base_s + prefill_token_s * prefill_tokens + decode_seq_s * decode_seqs +
    kv_token_s * kv_tokens_read`, the work being that of `step_work`."""

    base_s: float
    prefill_token_s: float
    decode_seq_s: float
    kv_token_s: float
    source: str

    def seconds(self, prefill_tokens: int, decode_seqs: int, kv_tokens_read: int) -> float:
        return (
            self.base_s
            + self.prefill_token_s * prefill_tokens
            + self.decode_seq_s * decode_seqs
            + self.kv_token_s * kv_tokens_read
        )


class PlannedRequest(Protocol):
    """The part of vLLM's `Request` that a step's work is read from, after the step was planned."""

    num_computed_tokens: int  # with those of the plan
    is_prefill_chunk: bool

    @property
    def num_output_tokens(self) -> int: ...


def step_work(
    requests: Iterable[PlannedRequest], num_scheduled_tokens: Iterable[int]
) -> tuple[int, int, int]:
    """(prefill tokens, decoding requests, KV tokens read) of a planned step.

    A request decodes in a step that computes its one newest token; all other tokens are prefill, those that a
    preempted request computes again too. KV tokens read are those that the step's requests had computed (or
    found in the prefix cache) before it.
    """
    prefill_tokens = decode_seqs = kv_tokens_read = 0
    for request, tokens in zip(requests, num_scheduled_tokens, strict=True):
        kv_tokens_read += request.num_computed_tokens - tokens
        if tokens == 1 and request.num_output_tokens and not request.is_prefill_chunk:
            decode_seqs += 1
        else:
            prefill_tokens += tokens
    return prefill_tokens, decode_seqs, kv_tokens_read


_BLIS = (
    "github.com/inference-sim/inference-sim (BLIS), defaults.yaml: beta coefficients fitted to vLLM 0.8.4 on "
    "H100, {model}, tensor parallel {parallel}. No term for KV reads: their decode term holds them."
)

PROFILES: dict[str, StepTime] = {
    "h100_llama_3_1_8b": StepTime(
        base_s=5.7527e-3,
        prefill_token_s=17.2509e-6,
        decode_seq_s=5.9991e-6,
        kv_token_s=0.0,
        source=_BLIS.format(model="meta-llama/llama-3.1-8b-instruct", parallel=1),
    ),
    "h100x4_llama_3_3_70b": StepTime(
        base_s=12.6013e-3,
        prefill_token_s=76.4228e-6,
        decode_seq_s=66.8440e-6,
        kv_token_s=0.0,
        source=_BLIS.format(model="meta-llama/llama-3.3-70b-instruct", parallel=4),
    ),
    # 8.03e9 weights of 2 bytes; 2 FLOP a weight and token; 32 layers * 8 KV heads * 128 * 2 (K, V) * 2 bytes.
    "h100_llama_3_1_8b_roofline": StepTime(
        base_s=2 * 8.03e9 / 3.35e12,
        prefill_token_s=2 * 8.03e9 / 989e12,
        decode_seq_s=0.0,
        kv_token_s=131_072 / 3.35e12,
        source="Computed, not measured: Llama-3.1-8B in bf16 (its model card and config.json) at the full "
        "3.35 TB/s and 989 dense bf16 TFLOP/s of NVIDIA's H100 SXM data sheet. A lower bound; it has the KV "
        "term that the fitted profiles lack.",
    ),
}


def load_profile(name_or_path: str) -> tuple[StepTime, EngineSettings]:
    """A named profile with vLLM's usual room, or a file that `pars-fast profile` wrote, with its engine's.

    Raises: DataError: if it is neither.
    """
    if name_or_path in PROFILES:
        return PROFILES[name_or_path], EngineSettings()
    path = Path(name_or_path)
    if not path.is_file():
        raise DataError(f"no profile or file {name_or_path!r}; profiles are: {', '.join(PROFILES)}")
    try:
        content = json.loads(path.read_text())
        step_time = {field.name: content["step_time"][field.name] for field in fields(StepTime)}
        engine = {field.name: content["engine"][field.name] for field in fields(EngineSettings)}
        return StepTime(**step_time), EngineSettings(**engine)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file that `pars-fast profile` wrote ({error!r})") from error
