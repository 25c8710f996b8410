"""The attention ops alone, with their peers: `python -m benchmarks.op [--json FILE] …`.

Times are medians of device time with cold caches, forward (nothing kept for backward) and forward + backward. GB/s are
those of the traffic that cannot be avoided: forward reads u, v, z and writes the output; backward reads u, v, z and the
output's gradient and writes three gradients. FLOPs are model FLOPs: backward twice forward, causal halves once.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import TimeLimit, describe_machine, median_milliseconds
from benchmarks.report import DispatchLog, results_file, write_results
from benchmarks.step import clean_up
from benchmarks.table import op_report
from flash_model.flops import mixed_chunk_flops, quadratic_flops
from flash_model.ops import AttentionState, mixed_chunk_attention, quadratic_attention

DOCUMENT_TOKENS = 1000  # average length of the documents

BACKENDS = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}

Differentiable = tuple[Callable[[], Tensor], list[Tensor]]


@dataclass(frozen=True)
class OpSize:
    """Widths and layouts (B, T) that are measured."""

    expanded: int
    qk_dim: int
    chunk: int
    other_chunks: tuple[int, ...]
    layouts: tuple[tuple[int, int], ...]
    """Of equal numbers of tokens: the first is the yardstick of those that follow it."""
    variants: tuple[int, int]
    """The layout of documents, both directions, states, other chunks and peers."""
    quadratic: tuple[tuple[int, int], ...]
    head_dim: int = 64
    wide_head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16


SIZES = {
    "110m": OpSize(
        expanded=1536,
        qk_dim=128,
        chunk=256,
        other_chunks=(128, 512),
        layouts=((128, 512), (8, 8192), (1, 65_536), (256, 512), (1, 131_072)),
        variants=(8, 8192),
        quadratic=((128, 512), (32, 2048), (8, 8192)),
    ),
    "tiny": OpSize(
        expanded=64,
        qk_dim=16,
        chunk=32,
        other_chunks=(16,),
        layouts=((4, 64), (1, 256)),
        variants=(2, 128),
        quadratic=((2, 128),),
        head_dim=32,
        wide_head_dim=32,
    ),
}


@dataclass(frozen=True)
class Case:
    """One thing to time. `make` draws its inputs on a device; flops and bytes are the whole forward's, and backward's.

    `yardstick`: name, B and T of an earlier case that this one is held against; `compared`: by what, in words.
    """

    section: str
    name: str
    B: int
    T: int
    make: Callable[[torch.device], Differentiable]
    flops: float
    forward_bytes: float | None = None
    backward_bytes: float | None = None
    inside: Callable[[], AbstractContextManager[None]] = nullcontext
    compared: str = ""
    yardstick: tuple[str, int, int] | None = None


@contextmanager
def reference_op() -> Iterator[None]:
    """Inside it the ops run as their reference."""
    before = os.environ.get("FLASH_OP")
    os.environ["FLASH_OP"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLASH_OP"]
        else:
            os.environ["FLASH_OP"] = before


def document_ids(B: int, T: int, device: torch.device) -> Tensor:
    """Number documents of random (geometric) lengths, (B, T) int64."""
    opens = torch.rand(B, T, device=device) < 1 / DOCUMENT_TOKENS
    return opens.long().cumsum(1)


def _normal(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale).requires_grad_()


def _heads(count: int, qk_dim: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [_normal(count, qk_dim, device=device, dtype=dtype, scale=scale) for scale in (1.0, 0.1)]


def make_mixed_chunk(
    size: OpSize, B: int, T: int, chunk: int, causal: bool, documents: bool, entering: bool, device: torch.device
) -> Differentiable:
    """Inputs of `mixed_chunk_attention`, drawn at random, with documents or after a state where asked for."""
    S, E = size.qk_dim, size.expanded
    uvz = _normal(B, T, 2 * E + S, device=device, dtype=size.dtype)
    gamma, beta = _heads(4, S, device, size.dtype)
    bias = _normal(2 * chunk - 1, device=device, dtype=size.dtype, scale=0.1)
    inputs = [uvz, gamma, beta, bias]
    state = None
    if entering:
        ones = torch.ones(B, dtype=torch.int64, device=device)
        state = AttentionState(_normal(B, S, E, device=device, dtype=torch.float32), ones, 0 * ones)
        inputs.append(state.sum)
    doc_ids = document_ids(B, T, device) if documents else None
    start = chunk if entering else 0
    run = partial(
        mixed_chunk_attention, *inputs[:4], chunk_size=chunk, causal=causal, doc_ids=doc_ids, start=start, state=state
    )
    return run, inputs


def make_quadratic(size: OpSize, B: int, T: int, device: torch.device) -> Differentiable:
    """Inputs of causal `quadratic_attention`, drawn at random."""
    S, E = size.qk_dim, size.expanded
    uvz = _normal(B, T, 2 * E + S, device=device, dtype=size.dtype)
    gamma, beta = _heads(2, S, device, size.dtype)
    bias = _normal(2 * T - 1, device=device, dtype=size.dtype, scale=0.1)
    return partial(quadratic_attention, uvz, gamma, beta, bias, norm_length=T), [uvz, gamma, beta, bias]


def make_softmax(size: OpSize, B: int, T: int, width: int, head_dim: int, device: torch.device) -> Differentiable:
    """Inputs of causal softmax attention, (B, T, heads, head_dim) in memory, as projections leave them."""
    qkv = [_normal(B, T, width // head_dim, head_dim, device=device, dtype=size.dtype) for _ in range(3)]

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, qkv


def make_fla(size: OpSize, B: int, T: int, device: torch.device) -> Differentiable:
    """Inputs of flash-linear-attention's causal linear attention: the linear part alone, one head."""
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found, unused-ignore]

    q, k = (_normal(B, T, 1, size.qk_dim, device=device, dtype=size.dtype) for _ in range(2))
    v = _normal(B, T, 1, size.expanded, device=device, dtype=size.dtype)
    return lambda: chunk_linear_attn(q, k, v, normalize=False)[0], [q, k, v]


def mixed_chunk_case(
    size: OpSize,
    name: str,
    B: int,
    T: int,
    section: str,
    *,
    chunk: int | None = None,
    causal: bool = True,
    documents: bool = False,
    entering: bool = False,
    **how: Any,
) -> Case:
    """A case of the op with its FLOPs and bytes."""
    chunk, S, E = chunk or size.chunk, size.qk_dim, size.expanded
    element = size.dtype.itemsize
    return Case(
        section,
        name,
        B,
        T,
        partial(make_mixed_chunk, size, B, T, chunk, causal, documents, entering),
        flops=mixed_chunk_flops(B * T, T, S, E, chunk, causal),
        forward_bytes=B * T * (3 * E + S) * element,
        backward_bytes=B * T * (5 * E + 2 * S) * element,
        **how,
    )


def cases(size: OpSize) -> Iterator[Case]:
    """Yield everything that is measured, what matters most first."""
    widths = f"E = {size.expanded}, S = {size.qk_dim}"
    yield from _layout_cases(size, f"mixed_chunk_attention, {widths}, C = {size.chunk}, causal")
    yield from _variant_cases(size, f"mixed_chunk_attention, {widths}, C = {size.chunk}, variants")
    yield from _quadratic_cases(size, f"quadratic_attention, {widths}, causal")
    yield from _peer_cases(size, "peers of mixed_chunk_attention in a layer of the same d_model")


def _layout_cases(size: OpSize, section: str) -> Iterator[Case]:
    shortest: dict[int, tuple[int, int]] = {}
    compared = "time against the shortest sequences of as many tokens"
    for B, T in size.layouts:
        yardstick = ("causal", *shortest.setdefault(B * T, (B, T)))
        yield mixed_chunk_case(size, "causal", B, T, section=section, compared=compared, yardstick=yardstick)


def _variant_cases(size: OpSize, section: str) -> Iterator[Case]:
    B, T = size.variants
    compared = "time against causal"
    variant = partial(mixed_chunk_case, size, B=B, T=T, section=section, compared=compared, yardstick=("causal", B, T))
    yield variant("causal")
    yield variant("causal, documents", documents=True)
    yield variant("causal, after a state", entering=True)
    yield variant("bidirectional", causal=False)
    yield variant("bidirectional, documents", causal=False, documents=True)
    for chunk in size.other_chunks:
        yield variant(f"causal, C = {chunk}", chunk=chunk)


def _quadratic_cases(size: OpSize, section: str) -> Iterator[Case]:
    S, E = size.qk_dim, size.expanded
    compared = "TFLOP/s against FA2"
    for B, T in size.quadratic:
        make = partial(make_softmax, size, B, T, E, size.wide_head_dim)
        names = {f"softmax, heads of {size.wide_head_dim}, {name}": backend for name, backend in BACKENDS.items()}
        yardstick = (next(iter(names)), B, T)
        for name, backend in names.items():
            flops, inside = quadratic_flops(B * T, T, E, E, True), partial(sdpa_kernel, backend)
            yield Case(section, name, B, T, make, flops, inside=inside, compared=compared, yardstick=yardstick)
        make, flops = partial(make_quadratic, size, B, T), quadratic_flops(B * T, T, S, E, True)
        yield Case(section, "quadratic_attention", B, T, make, flops, compared=compared, yardstick=yardstick)


def _peer_cases(size: OpSize, section: str) -> Iterator[Case]:
    compared, width = "time against mixed_chunk_attention", size.expanded // 2
    for B, T in size.layouts:
        make, flops = (
            partial(make_softmax, size, B, T, width, size.head_dim),
            quadratic_flops(B * T, T, width, width, True),
        )
        for name, backend in BACKENDS.items():
            yield Case(
                section,
                f"softmax, heads of {size.head_dim}, {name}",
                B,
                T,
                make,
                flops,
                inside=partial(sdpa_kernel, backend),
                compared=compared,
                yardstick=("causal", B, T),
            )
    B, T = size.variants
    op = ("causal", B, T)
    yield mixed_chunk_case(
        size, "the reference", B, T, section=section, inside=reference_op, compared=compared, yardstick=op
    )
    name, flops = "fla's chunk_linear_attn: the linear part alone", 4 * B * T * size.qk_dim * size.expanded
    yield Case(section, name, B, T, partial(make_fla, size, B, T), flops, compared=compared, yardstick=op)


def measure(case: Case, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the measurements of a case: "forward", then "both", forward + backward."""
    torch.manual_seed(0)
    run, inputs = case.make(device)
    with case.inside():
        with torch.no_grad():
            grad = torch.randn_like(run())
            forward = median_milliseconds(run, device)
        yield "forward", _rates(forward, case.flops, case.forward_bytes)
        both = median_milliseconds(lambda: torch.autograd.grad(run(), inputs, grad), device)
        traffic = case.forward_bytes and case.backward_bytes and case.forward_bytes + case.backward_bytes
        yield "both", _rates(both, 3 * case.flops, traffic)


def _rates(milliseconds: float, flops: float, traffic: float | None) -> dict[str, Any]:
    return {
        "ms": milliseconds,
        "tflops": 1e-9 * flops / milliseconds,
        "gb_per_s": traffic and 1e-6 * traffic / milliseconds,
        "ratio": None,
    }


def measure_or_say_why(case: Case, device: torch.device) -> dict[str, Any]:
    """Measure; whatever fails becomes the row's status, beside what was measured before."""
    names = {"section": case.section, "case": case.name, "B": case.B, "T": case.T, "compared": case.compared}
    row: dict[str, Any] = names | {"status": "ok"}
    try:
        for name, measured in measure(case, device):
            row[name] = measured
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except ImportError as error:
        row["status"] = f"not installed: {error.name}"
    except Exception as error:
        row["status"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"
    finally:
        clean_up(device)
    return row


def compare(row: dict[str, Any], case: Case, rows: list[dict[str, Any]]) -> None:
    """Enter the ratio of each pass to the case's yardstick, of times or FLOP rates, where that was measured."""
    what = "tflops" if "TFLOP/s" in case.compared else "ms"
    for earlier in rows:
        if (earlier["case"], earlier["B"], earlier["T"]) == case.yardstick:
            for name in row.keys() & earlier.keys() & {"forward", "both"}:
                row[name]["ratio"] = row[name][what] / earlier[name][what]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="110m" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--only", metavar="TEXT", help="only sections whose title holds TEXT")
    parser.add_argument("--seconds", type=float, help="leave out cases that would take longer than this in all")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="write all results, after each case")
    arguments = parser.parse_args()
    chosen = [case for case in cases(SIZES[arguments.size]) if (arguments.only or "") in case.section]
    if not chosen:
        titles = dict.fromkeys(case.section for case in cases(SIZES[arguments.size]))
        parser.error(f"--only: no section's title holds {arguments.only}; they are: {'; '.join(titles)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = TimeLimit(arguments.seconds)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    document = {
        "benchmark": "op",
        "size": arguments.size,
        "machine": describe_machine(device),
        "dispatch": DispatchLog().lines,
        "rows": rows,
        "left_out": left_out,
    }
    for case in chosen:
        if not limit.allows_another():
            left_out.append(f"{case.name}, {case.B} × {case.T:,}")
            continue
        row = measure_or_say_why(case, device)
        rows.append(row)
        compare(row, case, rows)
        if arguments.json:
            write_results(arguments.json, document)
    if arguments.json:
        write_results(arguments.json, document)
    print(op_report(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
