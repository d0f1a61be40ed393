"""What fewer bits in the linear layers do to the order: Kendall's tau to fp32, on the CPU, by rounding alone.

    python -m bench.fewer_bits --data DIR [--csv bench/results/fewer_bits.csv]

Weights have a scale for each output, activations one for each token, as a kernel with 8-bit operands has
them (W8A8); sums, residuals, LayerNorm and softmax are in fp32. So this is the best that a kernel can do, and
a format that falls short here needs none.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pars_fast.bench_results import all_threads, machine
from pars_fast.benchmark import held_out_rows, read_length_files
from pars_fast.bf16_products import with_linears
from pars_fast.metrics import kendall_tau
from pars_fast.output import write_csv
from pars_fast.ranker import CPU_BATCH_TOKENS, Ranker
from pars_fast.tokenization import batches

RESULTS = Path(__file__).parent / "results" / "fewer_bits.csv"
RANKERS = ("default", "small")


def _scaled(x: Tensor, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row over its own scale, such that its largest number becomes `largest`, rounded, and back."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / largest
    return rounded(x / scale) * scale


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: x.half().float(),
    "bf16": lambda x: x.bfloat16().float(),
    "int8": lambda x: _scaled(x, 127.0, torch.round),
    "fp8_e4m3": lambda x: _scaled(x, 448.0, lambda y: y.to(torch.float8_e4m3fn).float()),
}


class RoundedLinear(nn.Module):
    """A linear layer whose weight and input are rounded."""

    def __init__(self, exact: nn.Linear, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_features, self.bias, self._rounded = exact.in_features, exact.bias, rounded
        self.weight = nn.Parameter(rounded(exact.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._rounded(x), self.weight, self.bias)


@torch.inference_mode()
def scores_of(model: nn.Module, ids: list[list[int]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(B,) scores by `model`, in its own arithmetic."""
    scores = [model(batch.input_ids, batch.cu_seqlens) for batch in batches(ids, CPU_BATCH_TOKENS)]
    return torch.cat(scores).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of lengths_*.jsonl[.gz]")
    parser.add_argument("--max-prompts-per-file", type=int, help="of the held-out ones; all of them")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    most = arguments.max_prompts_per_file
    held_out = [held_out_rows(file)[0][:most] for file in read_length_files(arguments.data)]
    prompts = [row.prompt for rows in held_out for row in rows]
    rows, made = [], machine(all_threads())
    for name in RANKERS:
        ranker = Ranker.from_pretrained(name, device="cpu")
        ids = ranker.encode(prompts)
        exact = scores_of(ranker.model, ids)
        for form, rounded in FORMATS.items():
            model = with_linears(ranker.model, partial(RoundedLinear, rounded=rounded))
            scores = scores_of(model, ids)
            row = {
                "ranker": name,
                "format": form,
                "prompts": len(prompts),
                "kendall_tau": round(kendall_tau(scores, exact), 5),
                "largest_error": round(float(np.abs(scores - exact).max()), 5),
            }
            print(row, flush=True)
            rows.append({**row, **made})
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
