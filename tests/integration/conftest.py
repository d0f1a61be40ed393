"""A served model, a ranker, vLLM's own requests and schedulers, all made here: nothing is downloaded."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from pars_fast import Ranker
from pars_fast.calibration import TokenMap
from pars_fast.demo.model import make_tiny_model
from pars_fast.encoder_config import EncoderConfig
from pars_fast.model import ScoreModel

pytest.importorskip("vllm", reason="the vLLM integration needs vLLM")

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from pars_fast.integration import scheduler as scheduler_module
from pars_fast.integration.runtime import READY, Prompt, RankerRuntime, Scored
from tests.integration.engine import Engine, MakeScheduler

BLOCK_SIZE = 32  # the CPU platform warns of others
WORDS = ("tell", "me", "a", "story", "about", "the", "sea", "yes", "or", "no", "list", "all", "primes", "why")
CHAT_TEMPLATE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sets the `PARS_*` variables that it means."""
    for name in [name for name in os.environ if name.startswith("PARS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def make_prompts() -> Callable[[int], list[str]]:
    """Different prompts of 3 to 12 words."""

    def make(count: int) -> list[str]:
        rng = random.Random(0)
        return [f"{i} {' '.join(rng.choices(WORDS, k=rng.randint(3, 12)))}" for i in range(count)]

    return make


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory, make_prompts: Callable[[int], list[str]]) -> Path:
    """The demo's random Qwen2, with a tokenizer trained on the tests' prompts and a chat template."""
    directory = tmp_path_factory.mktemp("served_model")
    make_tiny_model(directory, make_prompts(50))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def ranker_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ranker of 2 layers, hidden 32, with a score-to-token map. Tests must not change it."""
    directory = tmp_path_factory.mktemp("ranker")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = EncoderConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    tokenizer = Tokenizer(WordPiece({token: index for index, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocab.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    torch.manual_seed(0)
    model = ScoreModel(config, "mean")
    token_map = TokenMap((-2.0, 0.0, 2.0), (10.0, 100.0, 1000.0))
    Ranker(model, config, tokenizer, max_tokens=32, token_map=token_map).save_pretrained(directory)
    return directory


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """A vLLM request with a prompt of `num_prompt_tokens` ids; ids count up unless given."""
    made = 0

    def make(
        request_id: str | None = None,
        *,
        num_prompt_tokens: int = 10,
        max_tokens: int = 16,
        priority: int = 0,
        pars_score: Any = None,
        pooling: bool = False,
        **fields: Any,
    ) -> Request:
        nonlocal made
        made += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        if pars_score is not None:
            params.extra_args = {"pars_score": pars_score}
        fields.setdefault("prompt_token_ids", [made % 1000] * num_prompt_tokens)
        return Request(
            request_id or f"request-{made}",
            sampling_params=None if pooling else params,
            pooling_params=PoolingParams(task="embed") if pooling else None,
            priority=priority,
            **fields,
        )

    return make


class FakeRuntime:
    """A ranker in memory: the test says when it is ready, what it scores and when it fails.

    `answer` gives the expected tokens of a prompt; with None, prompts stay in `pending` until `score` is
    called. `starts` counts starts, `submitted` and `forgotten` keep all prompts and seqs.
    """

    max_in_flight = 8
    weighs_prompts = True

    def __init__(self, answer: Callable[[Prompt], float] | None = None) -> None:
        self.answer = answer
        self.ready_on_start = True
        self.accepts = True
        self.reason: str | None = None
        self.device_order: list[int] | None = None
        self.forgotten: list[int] = []
        self.starts = 0
        self.closed = False
        self.submitted: list[Prompt] = []
        self.pending: list[Prompt] = []
        self._outbox: list[Scored] = []
        self.system_prompt: Callable[[Prompt], int] = lambda prompt: 0

    def start(self) -> RankerRuntime:
        self.starts += 1
        self.reason = None
        self.pending, self._outbox = [], [READY] if self.ready_on_start else []
        return self

    def submit(self, prompts: Sequence[Prompt]) -> bool:
        if self.accepts:
            self.submitted += prompts
            self.pending += prompts
        return self.accepts

    def poll(self) -> list[Scored]:
        if self.answer is not None:
            self.score(self.answer)
        scored, self._outbox = self._outbox, []
        return scored

    def order(self) -> Sequence[int] | None:
        return self.device_order

    def forget(self, seqs: Sequence[int]) -> None:
        self.forgotten += seqs

    def failure(self) -> str | None:
        return self.reason

    def close(self) -> None:
        self.closed = True

    def become_ready(self) -> None:
        self._outbox.append(READY)

    def score(self, answer: Callable[[Prompt], float]) -> None:
        """Answer all that is pending."""
        self._outbox += [
            Scored(prompt.seq, answer(prompt), self.system_prompt(prompt)) for prompt in self.pending
        ]
        self.pending = []


@pytest.fixture
def fake_runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def make_scheduler(served_model: Path) -> Iterator[Callable[..., Any]]:
    """A real vLLM scheduler of the given class, without a model behind it; shut down at the end."""
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    made: list[Any] = []

    def make(scheduler_cls: type, *, max_num_seqs: int = 4, num_blocks: int = 2000, **scheduler: Any) -> Any:
        config = VllmConfig(
            model_config=ModelConfig(model=str(served_model), dtype="float32", seed=0),
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=256,
                max_model_len=8192,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
                **scheduler,
            ),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False),
        )
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
        made.append(
            scheduler_cls(
                vllm_config=config,
                kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK_SIZE,
            )
        )
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.shutdown()


@pytest.fixture
def make_engine(make_scheduler: MakeScheduler) -> Callable[..., Engine]:
    def make(scheduler_cls: type, **arguments: Any) -> Engine:
        if issubclass(scheduler_cls, AsyncScheduler):
            arguments["async_scheduling"] = True
        return Engine(make_scheduler(scheduler_cls, **arguments))

    return make


@pytest.fixture
def use_policy(monkeypatch: pytest.MonkeyPatch, fake_runtime: Any) -> Callable[..., Any]:
    """Set the policy and put the ranker in memory behind it; gives the ranker."""

    def use(policy: str, **variables: str) -> Any:
        for name, value in {"PARS_POLICY": policy, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(scheduler_module, "make_runtime", lambda settings, config: fake_runtime)
        return fake_runtime

    return use
