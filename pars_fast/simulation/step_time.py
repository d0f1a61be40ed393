"""How long one engine step takes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTime:
    base_s: float
    prefill_token_s: float
    decode_seq_s: float
    kv_token_s: float
    source: str


PROFILES: dict[str, StepTime] = {"placeholder": StepTime(0.005, 4e-5, 2e-5, 1.5e-8, "placeholder")}
