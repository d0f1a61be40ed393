"""Columns of latency and throughput, the same for a real run and a simulated one (`docs/design.md`)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def latency_columns(arrival_s: NDArray[np.float64], first_token_s: NDArray[np.float64],
                    finished_s: NDArray[np.float64], output_tokens: NDArray[np.int64]) -> dict[str, Any]:
    """Columns of n requests; latencies are of those that completed, in seconds, None where none did.

    A wait is the time to the first token. `throughput_tok_s` is over the makespan,
    `throughput_to_last_arrival_tok_s` up to the last arrival, after which the engine runs empty.

    Args:
        arrival_s, first_token_s, finished_s: (n,), from the start of the run; `finished_s` is NaN for a
            request that did not complete, of which only the arrival counts.
        output_tokens: (n,), asked for.
    """
    done = np.isfinite(finished_s)
    first, finished, tokens = first_token_s[done], finished_s[done], output_tokens[done]
    end_to_end, ttft = finished - arrival_s[done], first - arrival_s[done]
    longer = tokens > 1  # a one-token answer has no time between tokens
    return {
        "requests": len(done),
        "completed": int(done.sum()),
        **_summary("latency_per_token_s", end_to_end / tokens),
        **_summary("ttft_s", ttft),
        **_summary("tpot_s", (finished - first)[longer] / (tokens[longer] - 1)),
        **_summary("e2e_s", end_to_end),
        "max_wait_s": rounded(ttft.max()) if done.any() else None,
        "throughput_tok_s": rounded(tokens.sum() / finished.max()) if done.any() else None,
        "throughput_to_last_arrival_tok_s": throughput_until(
            first, finished, tokens, arrival_s.max(initial=0.0)
        ),
        "makespan_s": rounded(finished.max()) if done.any() else None,
    }


def throughput_until(first_token_s: NDArray[np.float64], finished_s: NDArray[np.float64],
                     output_tokens: NDArray[np.int64], until_s: float) -> float | None:
    """Output tokens a second up to a moment; an unfinished answer counts as far as it has come.

    Arrays are (n,), times in seconds from the start of the run. None without a request or a second.
    """
    if not len(output_tokens) or until_s <= 0:
        return None
    span = np.maximum(finished_s - first_token_s, 1e-12)
    share = np.clip((until_s - first_token_s) / span, 0.0, 1.0)
    made = np.where(until_s < first_token_s, 0.0, 1 + (output_tokens - 1) * share)
    return rounded(made.sum() / until_s)


def _summary(name: str, values: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(values):
        return {f"{statistic}_{name}": None for statistic in ("mean", "p50", "p90", "p99")}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {f"mean_{name}": rounded(values.mean()), f"p50_{name}": rounded(p50),
            f"p90_{name}": rounded(p90), f"p99_{name}": rounded(p99)}


def rounded(value: float) -> float:
    """To six significant digits."""
    return float(f"{value:.6g}")
