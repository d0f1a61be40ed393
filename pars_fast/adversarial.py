"""A test set of our own making: pairs of prompts whose order is plain to a reader and hard for a ranker.

`adversarial.jsonl` holds `{"family", "shorter", "longer"}` a line. Nothing was trained or chosen on it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pars_fast.baselines import Predictor

PATH = Path(__file__).with_name("adversarial.jsonl")


@dataclass(frozen=True, slots=True)
class Pair:
    """`shorter` asks for a shorter answer than `longer`."""

    family: str
    shorter: str
    longer: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`margin` is score(longer) - score(shorter): positive when the order is right. Tokens are expected ones,
    None for a predictor without a map."""

    pair: Pair
    margin: float
    shorter_tokens: float | None
    longer_tokens: float | None


def adversarial_pairs() -> list[Pair]:
    """All pairs, in the order of the file."""
    return [Pair(**json.loads(line)) for line in PATH.read_bytes().splitlines()]


def judge(predictor: Predictor) -> list[Verdict]:
    """Every pair, scored in one batch."""
    pairs = adversarial_pairs()
    scores = (
        predictor.score([text for pair in pairs for text in (pair.shorter, pair.longer)]).double().numpy()
    )
    tokens = [None] * len(scores) if predictor.token_map is None else predictor.token_map(scores).tolist()
    return [
        Verdict(pair, float(long - short), short_tokens, long_tokens)
        for pair, short, long, short_tokens, long_tokens in zip(
            pairs, scores[::2], scores[1::2], tokens[::2], tokens[1::2], strict=True
        )
    ]


def right_by_family(verdicts: list[Verdict]) -> dict[str, tuple[int, int]]:
    """(pairs in the right order, pairs) of each family."""
    families = dict.fromkeys(verdict.pair.family for verdict in verdicts)
    return {
        family: (sum(v.margin > 0 for v in verdicts if v.pair.family == family), count)
        for family in families
        for count in [sum(v.pair.family == family for v in verdicts)]
    }
