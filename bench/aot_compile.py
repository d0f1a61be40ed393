"""Registers, spills and shared memory of every kernel, compiled ahead of time for GPUs that are not here.

    python -m bench.aot_compile [--csv bench/results/aot_compile.csv]

Block sizes are those the launchers choose. Must not run under TRITON_INTERPRET: interpreted kernels do not
compile.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "aot_compile.csv"
ARCHES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}  # A100, H100 and H200, B200
NUM_STAGES = 3  # Triton's own choice where a launcher makes none
KNOTS = 64  # of the rankers' maps from scores to tokens
DESTINATION = {  # the arguments of a kernel that publishes scores
    "slot_ptr": "*i64", "generation_ptr": "*i64", "prompt_work_ptr": "*fp64", "key_ptr": "*fp32",
    "slot_generation_ptr": "*i64", "dirty_ptr": "*i32", "map_scores_ptr": "*fp32", "map_tokens_ptr": "*fp32",
    "tokens_ptr": "*fp32", "M": "i32",
}  # fmt: skip
PUBLISHED = {  # and those that are constants: columns of 4 words and tiles, as the slot table has them
    "stride_slot": 4, "stride_generation": 4, "stride_work": 4, "TILE": 1024, "BLOCK_M": KNOTS,
}  # fmt: skip
NUM_SMS = 132  # of an H200: what the launchers of persistent kernels choose block sizes by


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. `signature` gives each argument that is no constexpr its Triton type."""

    shape: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, int | bool | None]
    num_warps: int
    num_stages: int = NUM_STAGES


@dataclass(frozen=True, slots=True)
class Row:
    kernel: str
    shape: str
    arch: str
    num_warps: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    triton: str


def cases() -> Iterator[Case]:
    """Every kernel of the project, at the shapes it runs in."""
    yield from pool_score_cases()
    yield from queue_cases()
    yield from encoder_cases()
    yield from small_batch_cases()


def first_shapes() -> Iterator[Case]:
    """The first case of every kernel."""
    seen: set[str] = set()
    for case in cases():
        if case.kernel.__name__ not in seen:
            seen.add(case.kernel.__name__)
            yield case


def pool_score_cases() -> Iterator[Case]:
    from pars_fast.kernels import pool_score
    from pars_fast.kernels.publish_score import publish_arguments

    for pooling in ("cls", "mean"):
        for hidden_size in (384, 768):
            config = pool_score.launch_config(hidden_size, pooling)
            yield Case(
                f"{pooling} H={hidden_size} bf16",
                pool_score._pool_score_kernel,
                {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "cu_seqlens_ptr": "*i32",
                 "score_ptr": "*fp32", "stride_t": "i32"},
                {"H": hidden_size, "CLS": pooling == "cls", "BLOCK_T": config["BLOCK_T"],
                 "BLOCK_H": config["BLOCK_H"], "PUBLISH": False, **publish_arguments(None)},
                config["num_warps"],
            )  # fmt: skip


def queue_cases() -> Iterator[Case]:
    """The slot table's kernels, and the order of 2^18 slots."""
    from pars_fast.kernels import pool_score, publish_score, slot_update
    from pars_fast.kernels import queue_topk as topk

    yield Case(
        "tile=1024",
        slot_update._slot_update_kernel,
        {"header_ptr": "*i64", "command_ptr": "*i64", "priority_rank_ptr": "*i32", "lane_ptr": "*i32",
         "key_ptr": "*fp32", "seq_ptr": "*i64", "occupied_ptr": "*i1", "generation_ptr": "*i64",
         "median_key_ptr": "*fp32", "seq_base_ptr": "*i64", "dirty_ptr": "*i32"},
        {"TILE": topk.MAX_TILE, "BLOCK": slot_update.BLOCK},
        slot_update.BLOCK // 32,
    )  # fmt: skip
    yield Case(
        "knots=64",
        publish_score._publish_score_kernel,
        {"score_ptr": "*fp32", **DESTINATION},
        dict(PUBLISHED),
        1,
    )
    for pooling in ("cls", "mean"):
        config = pool_score.launch_config(384, pooling)
        yield Case(
            f"{pooling} H=384 bf16 knots=64",
            pool_score._pool_score_kernel,
            {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "cu_seqlens_ptr": "*i32",
             "score_ptr": "*fp32", "stride_t": "i32", **DESTINATION},
            {"H": 384, "CLS": pooling == "cls", "BLOCK_T": config["BLOCK_T"], "BLOCK_H": config["BLOCK_H"],
             "PUBLISH": True, **PUBLISHED},
            config["num_warps"],
        )  # fmt: skip
    for k in (256, 1024):
        config = topk.launch_config(k, 1 << 18)
        K, tile_size, fan = config["K"], config["TILE"], topk.merge_fan(config["K"], 1 << 8)
        lists = {"list_ptr": "*i64", "list_slot_ptr": "*i32", "slot_ptr": "*i32", "k": "i32"}
        yield Case(
            f"k={k}",
            topk._queue_topk_tile_kernel,
            {"priority_rank_ptr": "*i32", "lane_ptr": "*i32", "key_ptr": "*fp32", "seq_ptr": "*i64",
             "occupied_ptr": "*i1", "median_key_ptr": "*fp32", "seq_base_ptr": "*i64", "dirty_ptr": "*i32",
             "keyed_with_ptr": "*i64", "rebuilt_ptr": "*i32", "N": "i32", **lists},
            {"K": K, "HALVINGS": topk.log2(tile_size // K), "TILE": tile_size},
            topk.TILE_WARPS,
        )  # fmt: skip
        yield Case(
            f"k={k}",
            topk._queue_topk_merge_kernel,
            {"list_ptr": "*i64", "rebuilt_ptr": "*i32", "merged_ptr": "*i64", "merged_rebuilt_ptr": "*i32",
             "num_lists": "i32"},
            {"K": K, "HALVINGS": topk.log2(fan)},
            topk.MERGE_WARPS,
        )  # fmt: skip
        yield Case(
            f"k={k}",
            topk._queue_topk_locate_kernel,
            {"top_ptr": "*i64", **lists},
            {"K": K, "BLOCK": topk.LOCATE_BLOCK},
            1,
        )


def small_batch_cases() -> Iterator[Case]:
    """The persistent kernel at MiniLM-L6's size: one short prompt, one of 128 tokens, eight of them; scores
    are left in memory, and published as the engine does."""
    from pars_fast.kernels import small_batch_score as module
    from pars_fast.kernels.publish_score import publish_arguments

    hidden_size, inner, heads = 384, 1536, 12
    kernel = module._small_batch_score_kernel
    integers = ("num_tokens", "num_prompts", "max_seqlen", "num_layers", "vocab_size", "max_positions")
    dtypes = {"input_ids_ptr": "*i32", "cu_seqlens_ptr": "*i32", "score_ptr": "*fp32", "counter_ptr": "*i32",
              **dict.fromkeys(integers, "i32"), "eps": "fp32", "scale": "fp32"}  # fmt: skip
    for num_tokens in (16, 128, 1024):
        config = module.launch_config(num_tokens, hidden_size, inner, torch.bfloat16, NUM_SMS)
        num_warps = config.pop("num_warps")
        sizes: dict[str, int | bool | None] = {
            "H": hidden_size, "INNER": inner, "HEADS": heads, "CLS": False, "BLOCK_H": 512, "BLOCK_D": 32,
            "PREFETCH": True, **config,
        }  # fmt: skip
        for publish, suffix in ((False, ""), (True, f" knots={KNOTS}")):
            constexprs = sizes | {"PUBLISH": publish}
            constexprs |= PUBLISHED if publish else publish_arguments(None)
            types = {name: (dtypes | DESTINATION).get(name, "*bf16") for name in kernel.arg_names}
            signature = {name: type_ for name, type_ in types.items() if name not in constexprs}
            shape = f"T={num_tokens} H={hidden_size} bf16{suffix}"
            yield Case(shape, kernel, signature, constexprs, num_warps)


def encoder_cases() -> Iterator[Case]:
    """The batched encoder in bf16, with a case for each tile a launcher chooses."""
    from pars_fast.kernels import attention, embed_layer_norm, linear, linear_layer_norm

    bf16 = torch.bfloat16

    def case(shape: str, kernel: Any, scalars: dict[str, str], config: dict[str, int]) -> Case:
        """Pointers are bf16 but for ids and offsets; `scalars` are the arguments that are numbers."""
        offsets = ("input_ids_ptr", "cu_seqlens_ptr")
        pointers = {
            name: "*i32" if name in offsets else "*bf16" for name in kernel.arg_names if name.endswith("_ptr")
        }
        options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages", NUM_STAGES)}
        return Case(f"{shape} bf16", kernel, pointers | scalars, dict(config), **options)

    for hidden_size, num_heads in ((384, 12), (768, 12)):  # MiniLM, bert-base
        yield case(
            f"H={hidden_size}",
            embed_layer_norm._embed_layer_norm_kernel,
            {"T": "i32", "num_bounds": "i32", "search_steps": "i32", "eps": "fp32"},
            {"V": 30522, "P": 512, "H": hidden_size, **embed_layer_norm.launch_config(hidden_size)},
        )
        head_size = hidden_size // num_heads
        yield case(
            f"S=128 D={head_size}",
            attention._attention_kernel,
            {"num_items": "i32", "tiles": "i32", "scale": "fp32"},
            {"HEADS": num_heads, "D": head_size, **attention.launch_config(head_size, 128, bf16)},
        )
    for num_rows, N, K, gelu in (
        (128, 1152, 384, False), (1024, 1536, 384, True), (16384, 1536, 384, True),
        (16384, 3072, 768, True), (16384, 768, 3072, False),
    ):  # fmt: skip
        yield case(
            f"T={num_rows} N={N} K={K}",
            linear._linear_kernel,
            {"T": "i32"},
            {"N": N, "K": K, "GELU": gelu, **linear.launch_config(num_rows, N, bf16)},
        )
    for num_rows, K in ((128, 384), (4096, 384), (16384, 1536)):
        yield case(
            f"T={num_rows} H=384 K={K}",
            linear_layer_norm._linear_layer_norm_kernel,
            {"T": "i32", "eps": "fp32"},
            {"H": 384, "K": K, **linear_layer_norm.launch_config(num_rows, 384, bf16)},
        )
    yield case(
        "H=768",
        linear_layer_norm._residual_layer_norm_kernel,
        {"T": "i32", "eps": "fp32"},
        {"H": 768, **linear_layer_norm.norm_launch_config(768)},
    )


def compile_case(case: Case, arch: str) -> Row:
    """Compile to PTX with Triton and read what ptxas says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # As at run time: tensors come from the allocator, aligned to 16 bytes and more.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(case.kernel, signature, case.constexprs, aligned)
    target = GPUTarget("cuda", ARCHES[arch], 32)
    compiled = triton.compile(
        source, target, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )
    log = ptxas_log(compiled.asm["ptx"], arch)
    return Row(
        kernel=case.kernel.__name__,
        shape=case.shape,
        arch=arch,
        num_warps=case.num_warps,
        registers=number(r"Used (\d+) registers", log),
        spill_store_bytes=number(r"(\d+) bytes spill stores", log),
        spill_load_bytes=number(r"(\d+) bytes spill loads", log),
        stack_bytes=number(r"(\d+) bytes stack frame", log),
        shared_bytes=compiled.metadata.shared,
        triton=triton.__version__,
    )


def ptxas_log(ptx: str, arch: str) -> str:
    """ptxas -v: triton tells registers and spills only after loading a kernel, which takes a GPU."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas_blackwell.path if ARCHES[arch] >= 90 else knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "kernel.ptx")).write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if not found:
        raise RuntimeError(f"ptxas said nothing like {pattern!r}: {log}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--first-shapes", action="store_true", help="one shape a kernel, for tests")
    arguments = parser.parse_args()
    path = arguments.csv
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for case in first_shapes() if arguments.first_shapes else cases():
            for arch in ARCHES:
                row = compile_case(case, arch)
                writer.writerow(asdict(row))
                print(
                    f"{row.kernel:28} {row.shape:16} {arch:8} {row.registers:4} registers "
                    f"{row.spill_store_bytes:4} B spilled {row.shared_bytes:6} B shared",
                    flush=True,
                )


if __name__ == "__main__":
    main()
