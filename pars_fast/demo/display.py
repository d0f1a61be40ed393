"""What the demo shows in the terminal: a bar for the run in hand, and a table that grows as runs end."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pars_fast.demo.records import Run
from pars_fast.output import wide_console

# column of Run.columns(), heading, format
_COLUMNS = (
    ("mean_latency_per_token_s", "s/token", "{:.4f}"),
    ("p99_latency_per_token_s", "p99", "{:.3f}"),
    ("mean_ttft_s", "TTFT s", "{:.2f}"),
    ("p99_ttft_s", "p99", "{:.2f}"),
    ("mean_tpot_s", "TPOT s", "{:.4f}"),
    ("mean_e2e_s", "e2e s", "{:.2f}"),
    ("p99_e2e_s", "p99", "{:.2f}"),
    ("max_wait_s", "max wait", "{:.2f}"),
    ("throughput_tok_s", "tok/s", "{:.0f}"),
    ("scored_total", "scored", "{}"),
    ("step_overhead_us_p50", "step +us", "{:.1f}"),
)
_NEWEST = 12  # runs shown while others are under way


class Display:
    """Use as a context manager; `task` gives the function that advances its bar."""

    def __init__(self, console: Console | None = None) -> None:
        self._runs: list[Run] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns)
        # The client shares two cores with the server, so the picture is drawn twice a second.
        self._live = Live(self._picture(), console=console or wide_console(), refresh_per_second=2)

    def __enter__(self) -> "Display":
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.update(self._picture(), refresh=True)
        self._live.__exit__(None, None, None)

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False)

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        task = self._progress.add_task(description, total=total)
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def add(self, run: Run) -> None:
        self._runs.append(run)
        if self._live.console.is_terminal:
            self._live.update(self._picture(_NEWEST))
        else:  # a log file gets a line at once, not only the table at the end
            columns = run.columns()
            figures = (f"{heading} {_cell(columns[name], form)}" for name, heading, form in _COLUMNS)
            self.say(f"load {run.load}, {run.policy}, repeat {run.repeat + 1}: {', '.join(figures)}")

    def _picture(self, newest: int = 0) -> Group:
        """The table of all runs, or only of so many newest, which fit a screen."""
        table = Table("load", "policy", "#", "done", *(heading for _, heading, _ in _COLUMNS))
        for run in self._runs[-newest:]:
            columns = run.columns()
            done = f"{columns['completed']}/{columns['requests']}"
            cells = (_cell(columns[name], form) for name, _, form in _COLUMNS)
            table.add_row(str(run.load), run.policy, str(run.repeat + 1), done, *cells)
        return Group(table, self._progress)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
