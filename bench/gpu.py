"""Run GPU cases and write their rows; without a GPU, mark each as not measured.

    pars-fast bench gpu --csv bench/results/gpu.csv --only score,queue_topk

The file is written anew after every case, and cases that it has from the same machine, versions and commit
are not run again: a run that was cut off, or did some ops alone, goes on where it was. A case that fails is
not measured either; it is named on stderr and the exit status is 1.
"""

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.gpu_cases import Case, all_cases
from pars_fast.bench_results import Report, Row, all_threads, machine, read_csv, write_csv
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
    parser.add_argument("--only", help="ops, by comma")
    arguments = parser.parse_args()
    path: Path = arguments.csv
    cases = list(all_cases())
    chosen = choose(cases, arguments.only)
    if not chosen:
        print(f"no op of {arguments.only}; there are: {', '.join(ops(cases))}", file=sys.stderr)
        return 1
    provenance = machine(all_threads())
    if not torch.cuda.is_available():
        write_csv(path, Report([case.row(None) for case in cases], provenance))
        print(f"no GPU: {len(cases)} cases marked as not measured in {path}")
        return 0
    measured = measured_before(path, provenance)
    failed = 0
    for case in sorted(chosen, key=compiles_for_minutes):
        if (name := case.row(None).case) in measured:
            continue
        try:
            measured[name] = run(case)
        except Exception as error:  # one provider's failure must not cost the others their rows
            failed += 1
            print(f"not measured: {case.op}, {case.provider}, {case.shape}: {error!r}", file=sys.stderr)
        rows = [measured.get(row.case, row) for row in (case.row(None) for case in cases)]
        write_csv(path, Report(rows, provenance))
    print_report(read_csv(path))
    return 1 if failed else 0


def choose(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Those of the ops that `only` names; all without it."""
    return [case for case in cases if only is None or case.op in only.split(",")]


def ops(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.op for case in cases))


def compiles_for_minutes(case: Case) -> bool:
    return case.provider.startswith("torch_compile")


def measured_before(path: Path, provenance: Mapping[str, str]) -> dict[tuple[object, ...], Row]:
    """Measured rows of a file that was written under the same conditions, by `Row.case`."""
    if not path.exists():
        return {}
    report = read_csv(path)
    if report.provenance != provenance:
        return {}
    return {row.case: row for row in report.rows if row.time_us is not None}


if __name__ == "__main__":
    sys.exit(main())
