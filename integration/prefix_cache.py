"""How much of a waiting prompt vLLM's prefix cache holds.

vLLM finds that out itself when it admits a request, block by block, and counts it in its statistics. An order
needs an estimate, and cheaply: blocks of a prefix leave the cache from its end, so the last one that is
there is found by bisection, in some ten look-ups for a prompt of 16,000 tokens. What is evicted or computed
until the request is admitted is not foreseen.
Source: vllm/v1/core/block_pool.py and kv_cache_manager.py, 0.29 to 0.32.
"""

import logging
from typing import Any

from vllm.v1.request import Request

logger = logging.getLogger("vllm.pars_fast")


class PrefixCache:
    """Called with a request: the tokens of its prompt that are cached now, a multiple of the block size.

    0 for what vLLM does not look up in the cache, for models with more than one kind of KV cache, and for
    good once anything is raised.
    """

    def __init__(self, kv_cache_manager: Any, block_size: int) -> None:
        self._manager, self._block_size = kv_cache_manager, block_size
        self._usable = True

    def __call__(self, request: Request) -> int:
        if not self._usable:
            return 0
        try:
            return self._cached_blocks(request) * self._block_size
        except Exception as error:
            self._usable = False
            logger.warning("pars-fast: prompts count as if none of them were cached: %r", error)
            return 0

    def _cached_blocks(self, request: Request) -> int:
        manager, hashes = self._manager, request.block_hashes
        if not manager.enable_caching or request.skip_reading_prefix_cache:
            return 0
        if len(manager.kv_cache_config.kv_cache_groups) != 1:
            return 0
        # One token at least is computed, as by vLLM. A preempted request has blocks of its answer there, too.
        held, missing = 0, min(len(hashes), (request.num_prompt_tokens - 1) // self._block_size) + 1
        probe = 1  # most prompts share nothing
        while missing - held > 1:
            if manager.block_pool.get_cached_block(hashes[probe - 1], [0]):
                held = probe
            else:
                missing = probe
            probe = (held + missing) // 2
        return held
