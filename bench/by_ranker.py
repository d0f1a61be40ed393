"""The command of a benchmark that measures rankers on a folder of length files, a row at a time."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pars_fast.bench_results import all_threads, machine
from pars_fast.benchmark import read_length_files
from pars_fast.data import LengthFile
from pars_fast.output import write_csv
from pars_fast.ranker import Ranker

Measure = Callable[[Sequence[LengthFile], Ranker, int | None], Iterable[dict[str, Any]]]


def run(description: str | None, measure: Measure, results: Path) -> None:
    """Write what `measure(files, ranker, prompts of a file at most)` gives, by ranker and with provenance.

    Raises: DataError: if there are no length files. CheckpointError: if a ranker cannot be loaded.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of lengths_*.jsonl[.gz]")
    parser.add_argument("--ranker", nargs="+", default=["default", "small"], metavar="NAME")
    parser.add_argument("--max-prompts-per-file", type=int, help="of the held-out ones; all of them")
    parser.add_argument("--csv", type=Path, default=results)
    arguments = parser.parse_args()
    files = read_length_files(arguments.data)
    rows, made = [], machine(all_threads())
    for name in arguments.ranker:
        ranker = Ranker.from_pretrained(name, device="cpu")
        for row in measure(files, ranker, arguments.max_prompts_per_file):
            rows.append({"ranker": name, **row, **made})
            print(rows[-1], flush=True)
    write_csv(arguments.csv, rows)
