"""Run all GPU cases and write their rows; without a GPU, mark each as not measured.

    pars-fast bench gpu --csv bench/results/gpu.csv

A case that fails is not measured either; it is named on stderr and the exit status is 1.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from bench.gpu_cases import Case, all_cases
from pars_fast.bench_results import Report, Row, all_threads, machine, write_csv
from pars_fast.bench_table import print_report


def run(case: Case) -> Row:
    """Measure one case on the current GPU.

    Raises: whatever its setup or its kernels raise.
    """
    try:
        return case.row(case.measure())
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    path: Path = parser.parse_args().csv
    rows: list[Row] = []
    failed = 0
    has_gpu = torch.cuda.is_available()
    for case in all_cases():
        row = case.row(None)
        if has_gpu:
            try:
                row = run(case)
            except Exception as error:  # one provider's failure must not cost the others their rows
                failed += 1
                print(f"not measured: {case.op}, {case.provider}, {case.shape}: {error!r}", file=sys.stderr)
        rows.append(row)
    report = Report(rows, machine(all_threads()))
    write_csv(path, report)
    if has_gpu:
        print_report(report)
    else:
        print(f"no GPU: {len(rows)} cases marked as not measured in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
