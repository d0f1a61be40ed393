"""Which runtime an engine gets: a thread on its GPU, or a process on the CPU; and its recording."""

from typing import Any

from pars_fast.integration.metrics import CounterFile
from pars_fast.integration.process_runtime import ProcessRuntime
from pars_fast.integration.prompt_text import PromptText
from pars_fast.integration.recorder import Decode, Recorder
from pars_fast.integration.runtime import RankerRuntime, Scorer, ThreadRuntime
from pars_fast.packaged import serving_ranker
from pars_fast.policies import POLICIES, Policy, needs_distribution, prompt_work, with_lengths
from pars_fast.settings import Settings


def make_policy(settings: Settings, vllm_config: Any) -> Policy:
    """The policy of one engine; one that orders by a distribution gets its ranker's.

    Raises: CheckpointError: if that ranker has none.
    """
    if not needs_distribution(settings.policy):
        return settings.make_policy()
    from pars_fast.ranker import read_length_distribution

    device = "cuda" if _ranks_on_gpu(settings, vllm_config) else "cpu"
    return with_lengths(
        settings.policy, read_length_distribution(serving_ranker(settings.ranker, device))
    )


def make_runtime(settings: Settings, vllm_config: Any) -> RankerRuntime:
    """The runtime of one engine, not yet started.

    Where the model runs in processes of its own (tensor, pipeline or data parallelism), EngineCore shares no
    CUDA context with it, and a second one would cost memory on the same GPU, so the ranker goes to the CPU.
    So it does, by itself, where the GPU's kernels fail their trial; a GPU that was asked for is waited for.
    Called in the thread that set the engine's GPU: the current device is each thread's own.
    """
    model = vllm_config.model_config

    on_cpu = ProcessRuntime(serving_ranker(settings.ranker, "cpu"), model.tokenizer, model.tokenizer_revision,
                            settings.cpu_threads, settings.chat_template)
    if not _ranks_on_gpu(settings, vllm_config):
        return on_cpu
    import torch

    from pars_fast.integration.gpu_scoring import make_gpu_scorer
    from pars_fast.integration.gpu_trial import try_kernels

    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0

    def load() -> Scorer:
        ranker = serving_ranker(settings.ranker, "cuda")
        device, sms = torch.device("cuda", index), settings.gpu_sms or None
        try_kernels(ranker, str(device), sms)
        return make_gpu_scorer(ranker, model.tokenizer, model.tokenizer_revision,
                               device=device, max_programs=sms,
                               prompt_work=prompt_work(POLICIES[settings.policy]) or 0.0,
                               chat_template=settings.chat_template)

    return ThreadRuntime(load, on_cpu if settings.device == "auto" else None)


def make_recorder(settings: Settings, vllm_config: Any, counters: CounterFile) -> Recorder | None:
    """The recording that `PARS_RECORD` asks for, None without it."""
    if settings.record is None:
        return None
    model = vllm_config.model_config

    def load_decode() -> Decode:
        return PromptText(model.tokenizer, model.tokenizer_revision, settings.chat_template)

    name = model.served_model_name
    column = str(name[0] if isinstance(name, list) else name or model.model)
    return Recorder(settings.record, settings.record_prompts, column, counters, load_decode)


def _ranks_on_gpu(settings: Settings, vllm_config: Any) -> bool:
    if settings.device == "auto":
        return _owns_a_gpu(vllm_config.parallel_config)
    return settings.device == "cuda"


def _owns_a_gpu(parallel_config: Any) -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda()) and parallel_config.distributed_executor_backend == "uni"
