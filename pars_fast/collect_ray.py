"""The questions of `pars-fast collect` asked by many machines: `--ray`, on Ray Data.

A worker takes a batch of prompts and asks as `ask_all` does; its outcomes come back when the batch is done,
and are kept here. So an interruption costs the batches under way. Every machine of the cluster needs
pars-fast and a way to the server. RAY_ADDRESS names a cluster; without it one is started on this machine.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pars_fast.collect import CollectError, Collection, Outcome, ask_all

ROUNDS_A_BATCH = 4  # of `concurrency` requests: fewer, and they would wait for the slowest too often
_CPUS = 0.25  # of a worker, which waits most of its time

_Columns = dict[str, list[Any]]


def ask_on_ray(
    wanted: Sequence[tuple[str, int]], collection: Collection, model: str, workers: int
) -> Iterator[Outcome]:
    """Outcomes of (prompt, sample) as their batches end, in no order.

    Raises: CollectError: if the server cannot be used; all outcomes until then have been given.
    """
    if not wanted:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray.data

    size = ROUNDS_A_BATCH * collection.concurrency
    rows = [{"prompt": prompt, "sample": sample} for prompt, sample in wanted]
    batches = -(-len(rows) // size)

    def ask(batch: Any) -> _Columns:
        return _ask_batch(zip(batch["prompt"], batch["sample"], strict=True), collection, model)

    with cluster():
        ray.data.DataContext.get_current().enable_progress_bars = False
        asked = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
            ask, batch_size=None, num_cpus=_CPUS, concurrency=min(workers, batches)
        )
        for row in asked.iter_rows():
            if row.pop("unusable"):
                raise CollectError(row["failure"])
            yield Outcome(**row)


@contextmanager
def cluster() -> Iterator[None]:
    """The caller's connection to Ray, or one for the time being."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _ask_batch(wanted: Any, collection: Collection, model: str) -> _Columns:
    """The outcomes in columns; one that is `unusable` comes last if the server is, and has the reason."""
    outcomes: list[dict[str, Any]] = []

    def take(outcome: Outcome) -> None:
        outcomes.append({**asdict(outcome), "unusable": False})

    pairs = [(str(prompt), int(sample)) for prompt, sample in wanted]
    try:
        asyncio.run(ask_all(pairs, collection, model, take))
    except CollectError as error:
        outcomes.append({**asdict(Outcome("", 0, failure=str(error))), "unusable": True})
    return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}
