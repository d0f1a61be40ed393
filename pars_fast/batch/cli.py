"""`pars-fast batch`: from options to a file of completions."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pars_fast.batch.job import Engine, Lengths, Limits, Report, run_job
from pars_fast.errors import DataError, ParsFastError, make_writable, require_extra


def add_batch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="F", help='.jsonl with "prompt", or a prompt a line')
    add("--out", type=Path, required=True, metavar="F.jsonl", help="completions; resumes by F.jsonl.sqlite")
    add("--model", required=True, help="what vLLM serves: a directory or a hub name")
    lengths = "ranker: batches by its expected lengths; perception: by the model's own; none: all at once"
    add("--lengths", choices=["ranker", "perception", "none"], default="ranker", help=lengths)
    add("--ranker", default="default", help="of --lengths ranker: default, small, a directory (%(default)s)")
    add("--max-tokens", type=int, default=1024, help="longest answer (%(default)s)")
    add("--batch-tokens", type=int, default=32768, help="KV tokens of a batch at most (%(default)s)")
    add("--max-batch", type=int, default=64, help="sequences of a batch at most (%(default)s)")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, help="of sampling")
    add("--chat", action="store_true", help="put prompts into the model's chat template")
    add("--engine", type=json_object, default={}, metavar="JSON", help='of vLLM, as {"max_num_seqs": 64}')
    parser.set_defaults(run=_batch)


def _batch(arguments: argparse.Namespace) -> None:
    limits = Limits(arguments.max_tokens, arguments.batch_tokens, arguments.max_batch)
    if min(limits.max_tokens, limits.batch_tokens, limits.max_batch) < 1:
        raise ParsFastError("--max-tokens, --batch-tokens and --max-batch must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ParsFastError(f"--temperature must be a number >= 0, got {arguments.temperature}")
    from pars_fast.batch.store import CompletionStore
    from pars_fast.collect import read_prompt_lines

    lines = read_prompt_lines(arguments.prompts)
    prompts = [prompt for _, prompt in lines]
    make_writable(arguments.out.parent)
    require_extra("vllm", "vllm")
    path = arguments.out.with_name(arguments.out.name + ".sqlite")
    with closing(CompletionStore(path, _settings(arguments), prompts)) as store:
        if store.missing():
            engine = _engine(arguments)
            _check_room(arguments.prompts, lines, engine)
            lengths = _lengths(arguments, engine)
            with _progress(len(prompts)) as show:
                report = run_job(prompts, store, engine, limits, lengths, on_answer=show)
            _print(report, lengths)
        store.export(arguments.out)
    print(f"{len(prompts)} completions written to {arguments.out}")


def _settings(arguments: argparse.Namespace) -> str:
    """What completions depend on: those made under other settings are not mixed in."""
    names = ("model", "max_tokens", "temperature", "seed", "chat", "engine")
    return json.dumps({name: getattr(arguments, name) for name in names}, sort_keys=True)


def json_object(text: str) -> dict[str, Any]:
    """An option's value. Raises: ValueError, ArgumentTypeError: if it is none."""
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, not {text}")
    return settings


def _engine(arguments: argparse.Namespace) -> Engine:
    """Raises: ParsFastError: if vLLM knows no such model or argument."""
    from vllm import LLM

    from pars_fast.batch.vllm_engine import VllmEngine

    try:
        llm = LLM(arguments.model, **arguments.engine)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # pydantic's has several lines
        raise ParsFastError(f"vLLM refuses --model or --engine: {reason}") from error
    return VllmEngine(llm, temperature=arguments.temperature, seed=arguments.seed, chat=arguments.chat)


def _check_room(path: Path, lines: Sequence[tuple[int, str]], engine: Engine) -> None:
    """Raises: DataError: names the first prompt that leaves no room for an answer."""
    sizes = engine.prompt_tokens([prompt for _, prompt in lines])
    most = engine.max_model_len - 1
    for (line, _), size in zip(lines, sizes, strict=True):
        if not 0 < size <= most:
            raise DataError(f"{path}:{line}: a prompt of {size} tokens; the model takes 1 to {most}")


def _lengths(arguments: argparse.Namespace, engine: Engine) -> Lengths | None:
    from pars_fast.batch.lengths import Perception, ranker_lengths

    match arguments.lengths:
        case "ranker":
            return lambda prompts: ranker_lengths(arguments.ranker, prompts)
        case "perception":
            return Perception(engine)
    return None


def _print(report: Report, lengths: Lengths | None) -> None:
    from pars_fast.batch.lengths import Perception

    print(
        f"{report.already} of {report.wanted} were there; {report.completed} completed in {report.batches} "
        f"batches, {report.output_tokens} tokens"
    )
    if lengths is not None:
        print(
            f"lengths told in {report.lengths_s:.2f} s; {report.recomputed} answers recomputed, "
            f"{report.wasted_tokens} tokens wasted on them"
        )
    if isinstance(lengths, Perception):
        print(
            f"the model spent {lengths.output_tokens} tokens on lengths, and told none of {lengths.unknown}"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Report], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: Any = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("completing", total=total)
        yield lambda report: bar.update(task, completed=report.already + report.completed)
