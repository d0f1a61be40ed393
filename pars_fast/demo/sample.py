"""The demo's prompts: a fixed sample of test-split prompts with their real answer lengths.

The sample was drawn once by `python -m pars_fast.demo.sample DATA_DIR`, with the shares and columns below
chosen before any result was seen. All sources may be redistributed: Arena-Hard (Apache-2.0), GPTeacher
(MIT), GSM8K (MIT), MMLU-Pro (MIT), MATH by way of ZeroEval (Apache-2.0).
"""

import gzip
import json
import sys
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from pars_fast.data import read_length_file

SEED = 2510
REQUESTS = 200
MAX_PROMPT_CHARS = 6000  # so that prompt and answer fit the stand-in model's context
MAX_OUTPUT_TOKENS = 800  # so that one answer does not outlast a run

# source: (share of the requests, the model whose recorded lengths are replayed)
SOURCES: dict[str, tuple[float, str]] = {
    "arena_hard_v0.1": (0.15, "gpt-4-0314"),
    "gpteacher_codegen": (0.20, "gpt-4"),
    "gpteacher_roleplay": (0.15, "gpt-4"),
    "gsm8k_models": (0.15, "gpt-4-1106-preview"),
    "mmlu_pro": (0.25, "Meta-Llama-3_1-70B-Instruct"),
    "zeroeval_math_l5": (0.10, "Meta-Llama-3-70B-Instruct"),
}


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """One prompt; `output_tokens` is the recorded length of `model_column`'s answer."""

    source: str
    model_column: str
    prompt: str
    output_tokens: int


def load_sample() -> list[SamplePrompt]:
    """The shipped sample, in the order in which the demo sends it."""
    content = gzip.decompress(files("pars_fast.demo").joinpath("sample.jsonl.gz").read_bytes())
    return [SamplePrompt(**json.loads(line)) for line in content.splitlines()]


def draw_sample(data_dir: Path) -> list[SamplePrompt]:
    """Draw the sample anew from length files: stratified by `SOURCES`, shuffled, seeded.

    Raises: DataError: if a file or a column is missing.
    """
    rng = np.random.default_rng(SEED)
    drawn: list[SamplePrompt] = []
    for source, (share, model) in SOURCES.items():
        file = read_length_file(data_dir / f"lengths_{source}.jsonl.gz").select("test")
        file.require_model(model)
        rows = [row for row in file.rows if len(row.prompt) <= MAX_PROMPT_CHARS
                and 1 <= row.output_tokens.get(model, 0) <= MAX_OUTPUT_TOKENS]
        for i in rng.choice(len(rows), round(share * REQUESTS), replace=False):
            drawn.append(SamplePrompt(source, model, rows[i].prompt, rows[i].output_tokens[model]))
    return [drawn[i] for i in rng.permutation(len(drawn))]


def main(data_dir: Path) -> None:
    lines = "".join(json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in draw_sample(data_dir))
    # mtime 0: the same sample gives the same bytes
    Path(__file__).with_name("sample.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
