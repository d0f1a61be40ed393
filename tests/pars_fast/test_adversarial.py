from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pars_fast.adversarial import adversarial_pairs, judge, right_by_family
from pars_fast.baselines import load_predictor
from pars_fast.calibration import TokenMap
from pars_fast.cli import main


class Knowing:
    """Knows the set by heart."""

    token_map: TokenMap | None = TokenMap((0.0, 1.0), (10.0, 100.0))

    def score(self, prompts: Sequence[str]) -> torch.Tensor:
        longer = {pair.longer for pair in adversarial_pairs()}
        shorter = {pair.shorter for pair in adversarial_pairs()}
        assert not longer & shorter
        return torch.tensor([float(prompt in longer) for prompt in prompts])

    def save_pretrained(self, path: str | Path) -> None:
        raise AssertionError("nobody is to save it")


def test_a_predictor_that_knows_is_right_on_all() -> None:
    verdicts = judge(Knowing())
    assert all((v.margin, v.shorter_tokens, v.longer_tokens) == (1, 10, 100) for v in verdicts)
    by_family = right_by_family(verdicts)
    assert all(right == count for right, count in by_family.values())
    assert sum(count for _, count in by_family.values()) == len(adversarial_pairs())


def test_prompt_length_is_wrong_where_the_set_means_it_to_be() -> None:
    by_family = right_by_family(judge(load_predictor("prompt_length")))
    assert by_family["long padding"][0] <= 1
    assert by_family["brief, in front"] == (0, 4)


def test_the_packaged_ranker_sees_past_padding_but_not_past_its_window(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate", "--adversarial", "--ranker", "small"]) == 0
    table = capsys.readouterr().out
    assert "past the window" in table
    by_family = right_by_family(judge(load_predictor("small")))
    assert by_family["long padding"][0] >= 3
    assert by_family["past the window"] == (0, 2)
