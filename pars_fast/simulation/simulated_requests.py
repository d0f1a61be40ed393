"""vLLM's requests of a workload, and the names of their KV blocks, for the faithful simulator.

The id of a request is its number in the workload, and so is every token of its prompt. A question is the same
prompt with an instruction behind it, which asks the model how long its answer will be.
"""

import functools
from collections.abc import Callable, Sequence

from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from pars_fast.policies.applications import Application
from pars_fast.simulation.workload import HASHED_TOKENS, Workload

QUESTION_TOKENS, ESTIMATE_TOKENS = 40, 6  # an instruction of two sentences; a number and its end
_QUESTION = -1  # the token of instructions


def make_request(workload: Workload, number: int, block_size: int, *, estimated: bool = False) -> Request:
    """The request of that number. `estimated`: the model said how long its answer is."""
    extra_args: dict[str, str | float] = {}
    if workload.app is not None and workload.app[number]:
        extra_args |= Application.parse(str(workload.app[number])).xargs()
    if estimated:
        extra_args["pars_score"] = float(workload.expected_tokens[number])
    sampling_params = SamplingParams(
        max_tokens=int(workload.output_tokens[number]), ignore_eos=True, extra_args=extra_args or None
    )
    return Request(
        request_id=str(number),
        prompt_token_ids=[number] * int(workload.prompt_tokens[number]),
        sampling_params=sampling_params,
        pooling_params=None,
        arrival_time=float(workload.arrival_s[number]),
        block_hasher=block_hasher(block_size, _hash_ids(workload, number)),
    )


def make_question(workload: Workload, number: int, block_size: int) -> Request:
    """The question of the request of that number; it is expected to be answered by a few tokens."""
    sampling_params = SamplingParams(
        max_tokens=ESTIMATE_TOKENS, ignore_eos=True, extra_args={"pars_score": ESTIMATE_TOKENS}
    )
    return Request(
        request_id=f"question {number}",
        prompt_token_ids=[number] * int(workload.prompt_tokens[number]) + [_QUESTION] * QUESTION_TOKENS,
        sampling_params=sampling_params,
        pooling_params=None,
        arrival_time=float(workload.arrival_s[number]),
        block_hasher=block_hasher(block_size, _hash_ids(workload, number)),
    )


def is_question(request_id: str) -> bool:
    return request_id.startswith("question")


def block_hasher(block_size: int, hash_ids: Sequence[int] = ()) -> Callable[[Request], list[BlockHash]]:
    """What names the KV blocks of a request whose id is its number; `hash_ids` are as in `Workload`."""
    return functools.partial(_new_block_hashes, block_size, hash_ids)


def _hash_ids(workload: Workload, number: int) -> Sequence[int]:
    return () if workload.hash_ids is None else workload.hash_ids[number]


def _new_block_hashes(block_size: int, hash_ids: Sequence[int], request: Request) -> list[BlockHash]:
    """Names of the blocks that have become full: prompt and place say what is in them.

    Of the prompt, a block has the name of the hashed tokens that it ends in, if there are `hash_ids`. A
    question's blocks are its request's as far as the prompt goes.
    """
    name, prompt_tokens = request.request_id, request.num_prompt_tokens
    if is_question(name):
        prompt_tokens -= QUESTION_TOKENS
    number = name.removeprefix("question ")
    names = []
    for block in range(len(request.block_hashes), request.num_tokens // block_size):
        last = (block + 1) * block_size - 1
        if last >= prompt_tokens:
            owner = name
        else:
            owner = f"shared {hash_ids[last // HASHED_TOKENS]}" if hash_ids else number
        names.append(BlockHash(f"{owner}:{block}".encode()))
    return names
