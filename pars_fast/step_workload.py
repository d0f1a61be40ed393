"""The scheduling step as a benchmark: vLLM's real `Scheduler`, stock and ranked, with a made-up model output.

N requests wait at every step. A step is `schedule()` and `update_from_output()`: it admits `SEATS` requests
and finishes them all. In between an engine gives the step to the model and asks for the grammar bitmask,
where the ranked scheduler keeps its books and plans ahead: that time is taken on its own. Then it waits for
the model, here for `MODEL_S`, in which threads in the background have their turn. Between steps, untimed,
`SEATS` of the waiting are aborted and twice as many arrive: as many without a score as the ranker takes in a
step, the others with a caller's estimate. With N = 0 as many arrive as there are seats, none is aborted and
nobody is left waiting: the load gate stays shut. Needs vLLM; loads no model, so it runs on any machine.
Source: vllm/v1/core/sched/scheduler.py and its tests (tests/v1/core/utils.py), 0.32.
"""

import gc
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from transformers import Qwen2Config
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pars_fast.errors import ParsFastError
from pars_fast.integration.process_runtime import ProcessRuntime
from pars_fast.integration.runtime import READY, Prompt, RankerRuntime, Scored
from pars_fast.integration.scheduler import with_ranking

SEATS = 16  # admitted, and finished, in each step
SCORED_A_STEP = min(SEATS, ProcessRuntime.max_in_flight)
MIN_WAITING = 2 * SEATS  # enough to admit and to abort
PROMPT_TOKENS = 128
WARM_UP_STEPS = 50
MODEL_S = 0.002  # shorter than a step of any model that is worth a queue
_BLOCK_SIZE = 32
_SETTINGS = {"PARS_TRUST_CALLER": "1"}
# Log of answer lengths: normal, of which the ranker sees a part. Gives Kendall's tau of about 0.4.
_LOG_MEDIAN, _SEEN_SIGMA, _UNSEEN_SIGMA = 5.0, 0.6, 0.8


class WholeAnswer(Request):  # type: ignore[misc]  # vLLM is not followed
    """A request whose one output token stands for its whole answer of `max_tokens`.

    So it finishes in the step that admits it, and the guard still sees an answer of real length.
    """

    @property
    def num_output_tokens(self) -> int:
        return len(self._output_token_ids) * self.max_tokens


class StepClock:
    """Seconds as an engine would see them: its own steps, not those of the scheduler beside it."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


class FakeRuntime:
    """A `RankerRuntime` that has scored every prompt by the next step: its first token is its score.

    Packs and unpacks messages as the runtime of the ranker's process does, since a step pays for that.
    """

    max_in_flight = ProcessRuntime.max_in_flight
    weighs_prompts = False

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[Scored]).decode
        self._answers: list[bytes] = []

    def start(self) -> RankerRuntime:
        self._answers = [self._encode([READY])]
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        self._encode(prompts)
        self._answers.append(self._encode([Scored(prompt.seq, float(prompt.ids[0])) for prompt in prompts]))
        return True

    def poll(self) -> list[Scored]:
        scored = [score for answer in self._answers for score in self._decode(answer)]
        self._answers.clear()
        return scored

    def order(self) -> None:
        """None: the order is the host's, as without a GPU."""

    def forget(self, seqs: Sequence[int]) -> None:
        pass

    def failure(self) -> str | None:
        return None

    def close(self) -> None:
        self._answers.clear()


class StepWorkload:
    """One scheduler, stepped and refilled by hand; `waiting` requests are in its queue after each refill.

    The same `seed` gives every scheduler the same arrivals.
    """

    def __init__(self, scheduler: Scheduler, waiting: int, *, seed: int = 0) -> None:
        self.scheduler = scheduler
        self._random = random.Random(seed)
        self.arrived = 0
        self._waiting: dict[str, None] = {}  # a set that keeps its order, for the seed's sake
        self._idle = not waiting
        self.add_ns = self.abort_ns = 0  # of the last refill, a request
        self.behind_model_ns = self.model_ns = 0  # of the last step: the bitmask, and until the model is done
        self._arrive(max(0, waiting - SEATS), estimated=True)  # the first refill brings the rest

    def step(self) -> list[str]:
        """One scheduling step; the ids of the requests it admitted, which have finished when it returns."""
        output = self.scheduler.schedule()
        started = time.perf_counter_ns()
        self.scheduler.get_grammar_bitmask(output)
        self.behind_model_ns = time.perf_counter_ns() - started
        time.sleep(MODEL_S)
        self.model_ns = time.perf_counter_ns() - started
        ids = list(output.num_scheduled_tokens)
        positions = {request_id: position for position, request_id in enumerate(ids)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(ids, positions, [[1]] * len(ids)))
        return ids

    def timed_step(self) -> int:
        """One step; its time in ns, less the model's, and with it what an engine does meanwhile."""
        started = time.perf_counter_ns()
        admitted = self.step()
        spent_ns = time.perf_counter_ns() - started - self.model_ns
        self.forget(admitted)
        return spent_ns

    def refill(self) -> None:
        """What happens between two steps: aborts, and arrivals that make up for all who left."""
        if self._idle:
            self._arrive(SEATS, estimated=False)
            return
        aborted = self._random.sample(list(self._waiting), SEATS)
        started = time.perf_counter_ns()
        self.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        self.abort_ns = (time.perf_counter_ns() - started) // SEATS
        self.forget(aborted)
        self._arrive(2 * SEATS - SCORED_A_STEP, estimated=True)
        self._arrive(SCORED_A_STEP, estimated=False)

    def forget(self, request_ids: list[str]) -> None:
        """These wait no longer."""
        for request_id in request_ids:
            del self._waiting[request_id]

    def _arrive(self, count: int, *, estimated: bool) -> None:
        requests = []
        for _ in range(count):
            expected_tokens, answer_tokens = draw_lengths(self._random)
            extra_args = {"pars_score": expected_tokens} if estimated else None
            sampling_params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True, extra_args=extra_args)
            prompt_token_ids = [expected_tokens, *range(1, PROMPT_TOKENS)]
            requests.append(WholeAnswer(f"{self.arrived}", prompt_token_ids, sampling_params, None))
            self.arrived += 1
        started = time.perf_counter_ns()
        for request in requests:
            self.scheduler.add_request(request)
        self.add_ns = (time.perf_counter_ns() - started) // max(1, count)
        self._waiting |= dict.fromkeys(request.request_id for request in requests)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What `pars-fast bench step` reports; `added` is ranked less stock, of the same step number.

    Its 99th percentile holds the noise of both; that of all stock and of all ranked steps shows what ranking
    does to the slowest ones. `behind_model` is what ranking adds while the model runs. `add` and `abort` are
    for one request, between steps.
    """

    waiting: int
    stock_us_p50: float
    ranked_us_p50: float
    added_us_p50: float
    added_us_p99: float
    stock_us_p99: float
    ranked_us_p99: float
    behind_model_us_p50: float
    behind_model_us_p99: float
    add_added_us_p50: float
    abort_added_us_p50: float


class StepPair:
    """Stock and ranked scheduler side by side in one process, fed alike and timed in turn.

    A round is `prepare()`, `ranked_step()`, `complete()`. The stock step runs before the ranked one in even
    rounds and after it in odd ones, so that neither always finds the caches warm. The garbage collector is
    on and, as in EngineCore, what was alive before the first request is frozen. If not `ranking`, both are
    stock: the difference is then what the machine itself makes of two equal steps.

    Raises: ParsFastError: if `waiting` is neither 0 nor at least `MIN_WAITING`.
    """

    def __init__(
        self, waiting: int, scheduler_cls: type[Scheduler] = Scheduler, *, ranking: bool = True
    ) -> None:
        if waiting < MIN_WAITING and waiting != 0:
            raise ParsFastError(f"waiting must be 0 or at least {MIN_WAITING}, got {waiting}")
        self.waiting = waiting
        self._clock = StepClock()
        schedulers = [
            make_scheduler(scheduler_cls),
            make_ranked_scheduler(scheduler_cls, self._clock) if ranking else make_scheduler(scheduler_cls),
        ]
        freeze_gc_heap()
        self.stock, self.ranked = (StepWorkload(scheduler, waiting) for scheduler in schedulers)
        self.stock_ns: list[int] = []
        self.ranked_ns: list[int] = []
        self._behind_model_ns: list[int] = []
        self._added_between_ns: list[tuple[int, int]] = []  # (add, abort)
        self.run(WARM_UP_STEPS)
        for measured in (self.stock_ns, self.ranked_ns, self._behind_model_ns, self._added_between_ns):
            measured.clear()

    def prepare(self) -> None:
        self.stock.refill()
        self.ranked.refill()
        self._added_between_ns.append(
            (self.ranked.add_ns - self.stock.add_ns, self.ranked.abort_ns - self.stock.abort_ns)
        )
        if len(self.ranked_ns) % 2 == 0:
            self.stock_ns.append(self.stock.timed_step())

    def ranked_step(self) -> None:
        self._clock.time_s += MODEL_S
        self.ranked_ns.append(self.ranked.timed_step())
        self._behind_model_ns.append(self.ranked.behind_model_ns)

    def complete(self) -> None:
        if len(self.stock_ns) < len(self.ranked_ns):
            self.stock_ns.append(self.stock.timed_step())

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.prepare()
            self.ranked_step()
            self.complete()

    def times(self) -> StepTimes:
        stock, ranked = np.array(self.stock_ns) / 1e3, np.array(self.ranked_ns) / 1e3
        behind = np.array(self._behind_model_ns) / 1e3
        p50, p99 = np.quantile([stock, ranked, ranked - stock, behind], [0.5, 0.99], axis=1).tolist()
        add, abort = (np.median(self._added_between_ns, axis=0) / 1e3).tolist()
        return StepTimes(
            self.waiting,
            stock_us_p50=p50[0], ranked_us_p50=p50[1], added_us_p50=p50[2], added_us_p99=p99[2],
            stock_us_p99=p99[0], ranked_us_p99=p99[1], behind_model_us_p50=p50[3], behind_model_us_p99=p99[3],
            add_added_us_p50=add, abort_added_us_p50=abort,
        )  # fmt: skip

    def close(self) -> None:
        gc.unfreeze()
        self.stock.scheduler.shutdown()
        self.ranked.scheduler.shutdown()


def measure_step(
    waiting: int, rounds: int, scheduler_cls: type[Scheduler] = Scheduler, *, ranking: bool = True
) -> StepTimes:
    """Times of `rounds` paired steps with `waiting` requests in the queue, of a vLLM scheduler class.

    Raises: ParsFastError: as `StepPair`.
    """
    pair = StepPair(waiting, scheduler_cls, ranking=ranking)
    pair.run(rounds)
    pair.close()
    return pair.times()


def draw_lengths(rng: random.Random) -> tuple[int, int]:
    """(expected, real) answer tokens of a request, as a calibrated ranker of middling quality has them."""
    seen = rng.gauss(_LOG_MEDIAN, _SEEN_SIGMA)
    real = seen + rng.gauss(0.0, _UNSEEN_SIGMA)
    return max(1, round(math.exp(seen + _UNSEEN_SIGMA**2 / 2))), max(1, round(math.exp(real)))


def make_scheduler(scheduler_cls: type[Scheduler]) -> Scheduler:
    """A scheduler of `SEATS` seats and room enough in the KV cache, for a model that is never loaded."""
    num_blocks = 2 * SEATS * (PROMPT_TOKENS // _BLOCK_SIZE + 1)
    with tempfile.TemporaryDirectory() as model:
        Qwen2Config(architectures=["Qwen2ForCausalLM"], num_hidden_layers=1).save_pretrained(model)
        model_config = ModelConfig(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=1024)
        scheduler_config = SchedulerConfig(
            max_num_seqs=SEATS,
            max_num_batched_tokens=SEATS * PROMPT_TOKENS,
            max_model_len=1024,
            is_encoder_decoder=False,
        )
        cache_config = CacheConfig(block_size=_BLOCK_SIZE, enable_prefix_caching=False)
        config = VllmConfig(
            model_config=model_config, scheduler_config=scheduler_config, cache_config=cache_config
        )
    cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=_BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return scheduler_cls(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=_BLOCK_SIZE,
    )


def make_ranked_scheduler(scheduler_cls: type[Scheduler], clock: Callable[[], float]) -> Scheduler:
    """The same on that clock, ranked by a `FakeRuntime`; counters go to a mapped file, as in a server."""
    runtime = patch("pars_fast.integration.scheduler.make_runtime", return_value=FakeRuntime())
    with tempfile.TemporaryDirectory() as metrics, _settings(PARS_METRICS_DIR=metrics), runtime:
        return make_scheduler(
            type("TimedScheduler", (with_ranking(scheduler_cls),), {"clock": clock})  # type: ignore[arg-type]
        )


@contextmanager
def _settings(**variables: str) -> Iterator[None]:
    """The workload's `PARS_*` variables in place of the caller's."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("PARS_")}
    with patch.dict(os.environ, {**others, **_SETTINGS, **variables}, clear=True):
        yield
