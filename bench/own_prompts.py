"""What prompts and answer lengths of one's own add to a ranker.

    python -m bench.own_prompts --data DIR --out runs [--ranker small] [--seeds 3] [--csv F]

A ranker goes on training on so many prompts of a file that it has not seen, with the lengths of one model, as
`pars-fast train --init RANKER --model-column MODEL` does; tau-b is of the file's held-out prompts and that
model. The epoch is chosen by validation prompts of one's own: 15 for each 70, beyond that number. No file
that the packaged rankers have not seen has 3,000 prompts. So for mmlu_pro, which has 8,400, the start is
`stranger`: like `small`, but without a teacher, and trained on all other files.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pars_fast.bench_results import all_threads, machine
from pars_fast.benchmark import held_out_rows, mean_tau, read_length_files
from pars_fast.data import LengthFile, LengthRow
from pars_fast.errors import DataError
from pars_fast.output import write_csv
from pars_fast.ranker import Ranker
from pars_fast.training import Recipe, trained_with
from pars_fast.training_runs import trained_once

RESULTS = Path(__file__).parent / "results" / "own_prompts.csv"
OWN_PROMPTS = (100, 300, 1000, 3000)
SERVED = {"codealpaca_2k": "text-davinci-003", "flask": "alpaca_13b", "alpaca_eval": "gpt4"}
LARGE, LARGE_SERVED = "mmlu_pro", "Qwen1.5-72B-Chat"
STRANGER = Recipe(
    loss="huber", pooling="cls", epochs=4, batch_prompts=24, learning_rate=5e-4, layers=1,
    max_prompts_per_file=4500,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of lengths_*.jsonl[.gz]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; goes on with them")
    parser.add_argument("--ranker", nargs="+", default=["small", "stranger"], metavar="NAME",
                        help="packaged ones, a directory, or stranger (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each number of prompts (%(default)s)")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    files = {file.name: file for file in read_length_files(arguments.data)}
    rows, made = [], machine(all_threads())
    for name in arguments.ranker:
        for row in measure(files, name, arguments.out, OWN_PROMPTS, range(arguments.seeds)):
            rows.append({**row, **made})
            print(row, flush=True)
            write_csv(arguments.csv, rows)


def measure(
    files: dict[str, LengthFile], ranker: str, out: Path, numbers: Sequence[int], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What `ranker` orders as it is, and trained on by each number of own prompts, once a seed.

    Where a file has fewer prompts than asked for, its last number is all of them.

    Yields: `ranker`, `file`, `model`, `own_prompts` in training, `seed` (None as it is), `kendall_tau`.
    Raises: DataError: if a file is missing; as `trained_once`.
    """
    served = SERVED if ranker != "stranger" else {LARGE: LARGE_SERVED}
    for name in served:
        if name not in files:
            raise DataError(f"--data has no lengths_{name}.jsonl or .jsonl.gz")
    start = ranker
    if ranker == "stranger":
        others = [file for name, file in files.items() if name != LARGE]
        start = str(trained_once(out / "stranger", others, "minilm", STRANGER))
    goes_on = trained_with(start)
    for name, model in served.items():
        row = {"ranker": ranker, "file": name, "model": model}
        yield {**row, "own_prompts": 0, "seed": None, "kendall_tau": _tau(start, files[name], model)}
        own = sum(each.split == "train" and model in each.output_tokens for each in files[name].rows)
        for number in dict.fromkeys(min(number, own) for number in numbers):
            for seed in seeds:
                recipe = Recipe(**goes_on, model_column=model, seed=seed)
                directory = out / f"{Path(ranker).name}-{name}-{number}-{seed}"
                run = trained_once(directory, [_of_ones_own(files[name], model, number, seed)], start, recipe)
                tau = _tau(run, files[name], model)
                yield {**row, "own_prompts": number, "seed": seed, "kendall_tau": tau}


def _of_ones_own(file: LengthFile, model: str, number: int, seed: int) -> LengthFile:
    """So many prompts to train on, and of the validation split what belongs to them in 70 / 15 / 15."""
    draw, rows = random.Random(seed), list[LengthRow]()
    for split, wanted in (("train", number), ("val", number * 15 // 70)):
        there = [row for row in file.rows if row.split == split and model in row.output_tokens]
        rows += draw.sample(there, min(wanted, len(there)))
    return replace(file, rows=tuple(rows))


def _tau(ranker: str | Path, file: LengthFile, model: str) -> float:
    rows, _ = held_out_rows(file)
    scores = Ranker.from_pretrained(ranker, device="cpu").score([row.prompt for row in rows])
    return round(mean_tau(scores.double().numpy(), rows, [model]), 4)


if __name__ == "__main__":
    main()
