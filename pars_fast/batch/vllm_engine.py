"""vLLM's offline engine (`LLM`, 0.32), for batch jobs: completions come out as they finish.

`LLM.generate` gives all outputs at the end, and a job that is killed would lose them; so requests are given
to the engine below it, and stepped, as `LLM.generate` does itself. Source: vllm/entrypoints/llm.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from pars_fast.batch.job import Piece
from pars_fast.batch.store import Completion


class VllmEngine:
    """`chat` puts a prompt into the model's chat template, as a user's turn."""

    def __init__(
        self, llm: LLM, *, temperature: float = 0.0, seed: int | None = None, chat: bool = False
    ) -> None:
        self._llm, self._temperature, self._seed, self._chat = llm, temperature, seed, chat
        self.max_model_len: int = llm.llm_engine.vllm_config.model_config.max_model_len

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._token_ids(prompts)]

    def generate(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, Completion]]:
        engine = self._llm.llm_engine
        for piece, ids in zip(pieces, self._token_ids([piece.prompt for piece in pieces]), strict=True):
            engine.add_request(str(piece.number), {"prompt_token_ids": ids}, self.sampling(piece))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id), self.completion(int(output.request_id), output.outputs[0])

    def sampling(self, piece: Piece) -> SamplingParams:
        """What vLLM is asked for."""
        return SamplingParams(
            max_tokens=piece.max_tokens,
            temperature=self._temperature,
            seed=self._seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def completion(self, number: int, output: Any) -> Completion:
        """What vLLM gave."""
        return Completion(output.text, len(output.token_ids), output.finish_reason)

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self._llm.get_tokenizer()
        if self._chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [
                tokenizer.apply_chat_template(
                    turn, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                for turn in turns
            ]
        return [tokenizer.encode(prompt) for prompt in prompts]
