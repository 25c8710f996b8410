"""Kernels of mixed chunk attention over its values, made of the tiles of triton_mixed_chunk_products.py.

Causal, one launch does a whole pass: chunks are taken in slices, in the direction of the scan, and the programs of
slice k's chunk sums stand before those of slice k − 1's scan and of slice k − 2's outputs. So what one step writes is
in the L2 cache when the next one reads it, and any B and T give the same work. A program waits for programs before it
only, and the GPU starts programs in their order, so nothing waits for what cannot start. What is summed, and in which
order, does not depend on who waited.

Shape letters: B batch, T time, G chunks, N = B·G, C chunk, S query/key, L = S · routes, E values.
"""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from flash_model.ops.triton_mixed_chunk_heads import document
from flash_model.ops.triton_mixed_chunk_products import (
    chunk_sums_tile,
    gate_backward_tile,
    output_tile,
    products_backward_tile,
)


@triton.jit
def _wait(counter, target):
    """Wait until `target` programs are done."""
    done = tl.atomic_add(counter, 0, sem="acquire")
    while done < target:
        done = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _done(counter):
    """Say that this program is done: what it wrote can be read."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _handed_on(doc_ptr, state_doc_ptr, b, g, T, G, C: tl.constexpr, DOCS: tl.constexpr, HAS_STATE: tl.constexpr):
    """Whether chunk g hands on the document that arrives at it."""
    arriving = document(doc_ptr, b, tl.maximum(g * C - 1, 0), T, DOCS)
    if HAS_STATE:
        arriving = tl.where(g == 0, tl.load(state_doc_ptr + b), arriving)
    return document(doc_ptr, b, g * C + C - 1, T, DOCS) == arriving


@triton.jit
def _scan_slice(
    slice_, block, sums_ptr, carry_ptr, initial_ptr, left_ptr, doc_ptr, state_doc_ptr,
    N, T, G, width, C: tl.constexpr, REVERSE: tl.constexpr, DOCS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, LEAVE: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace the sums (N, width) of a slice of chunks, in place, by what arrives at each; one block of columns.

    What arrives at a chunk is carried on, beside the chunk's own sum, where the chunk hands on the same document.
    REVERSE is the adjoint: the same from the other end. carry (slices, width), float32, goes from slice to slice; what
    leaves a sequence goes to left (B, width), float32.
    """
    column = block * BLOCK + tl.arange(0, BLOCK)
    first = slice_ * SLICE
    steps = ()
    for ahead in tl.static_range(SLICE):
        i = first + ahead
        n = (N - 1 - i if REVERSE else i).to(tl.int64)
        x = tl.load(sums_ptr + n * width + column, mask=column < tl.where(i < N, width, 0), other=0.0)
        steps = steps + (x,)
    before = column < tl.where(slice_ > 0, width, 0)
    carried = tl.load(carry_ptr + (slice_ - 1).to(tl.int64) * width + column, mask=before, other=0.0)
    for ahead in tl.static_range(SLICE):
        i = first + ahead
        n = (N - 1 - i if REVERSE else i).to(tl.int64)
        b = n // G
        g = n % G
        begins = g == (G - 1 if REVERSE else 0)
        present = tl.where(i < N, width, 0)
        if HAS_INITIAL:
            initial = tl.load(initial_ptr + b * width + column, mask=column < tl.where(begins, present, 0), other=0.0)
            carried = tl.where(begins, initial.to(tl.float32), carried)
        else:
            carried = tl.where(begins, 0.0, carried)
        tl.store(sums_ptr + n * width + column, carried.to(sums_ptr.dtype.element_ty), mask=column < present)
        keep = _handed_on(
            doc_ptr, state_doc_ptr, tl.where(i < N, b, 0), tl.where(i < N, g, 0), T, G, C, DOCS, HAS_STATE
        )
        carried = steps[ahead].to(tl.float32) + tl.where(keep, carried, 0.0)
        if LEAVE:
            ends = g == (0 if REVERSE else G - 1)
            tl.store(left_ptr + b * width + column, carried, mask=column < tl.where(ends, present, 0))
    tl.store(carry_ptr + slice_.to(tl.int64) * width + column, carried, mask=column < width)


@triton.jit(do_not_specialize=["N", "T", "G", "slices"])
def forward_kernel(
    uvz_ptr, queries_ptr, keys_ptr, states_ptr, values_ptr, out_ptr, counters_ptr, carry_ptr, initial_ptr, left_ptr,
    doc_ptr, state_doc_ptr,
    N, T, G, slices, width, stride_b, stride_t,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr, LEAVE: tl.constexpr, SUMS: tl.constexpr, OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr, SUMS_E: tl.constexpr, SUMS_STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Causal forward: for each chunk SUMS tiles of chunk sums, its scan, OUTPUTS tiles of output.

    counters (2, slices) are 0 at first. Grid: (slices + 2) · (programs of a slice).
    """
    scans = tl.cdiv(width, BLOCK)
    group = tl.program_id(0) // (SLICE * SUMS + scans + SLICE * OUTPUTS)
    program = tl.program_id(0) % (SLICE * SUMS + scans + SLICE * OUTPUTS)
    if program < SLICE * SUMS:
        n = group * SLICE + program // SUMS
        if n < N:
            chunk_sums_tile(
                n, program % SUMS, uvz_ptr, keys_ptr, values_ptr, states_ptr, T, G, stride_b, stride_t,
                E, L, C, WHOLE, BLOCK_L, SUMS_E, SUMS_STEP, STAGES,
            )  # fmt: skip
            _done(counters_ptr + group)
    elif program < SLICE * SUMS + scans:
        slice_ = group - 1
        if (slice_ >= 0) & (slice_ < slices):
            _wait(counters_ptr + slice_, SUMS * tl.minimum(SLICE, N - slice_ * SLICE))
            if slice_ > 0:
                _wait(counters_ptr + slices + slice_ - 1, scans)
            _scan_slice(
                slice_, program - SLICE * SUMS, states_ptr, carry_ptr, initial_ptr, left_ptr, doc_ptr, state_doc_ptr,
                N, T, G, width, C, False, DOCS, HAS_STATE, HAS_STATE, LEAVE, SLICE, BLOCK,
            )  # fmt: skip
            _done(counters_ptr + slices + slice_)
    else:
        slice_ = group - 2
        program -= SLICE * SUMS + scans
        n = slice_ * SLICE + program // OUTPUTS
        if (slice_ >= 0) & (n < N):
            _wait(counters_ptr + slices + slice_, scans)
            output_tile(
                n, program % OUTPUTS, uvz_ptr, queries_ptr, states_ptr, values_ptr, out_ptr, T, G, stride_b, stride_t,
                G.to(tl.int64) * width, width, E, L, C, True, WHOLE, ROWS, BLOCK_E, STEP, STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "G", "slices"])
def backward_kernel(
    uvz_ptr, out_ptr, grad_out_ptr, queries_ptr, keys_ptr, states_ptr, grad_uvz_ptr, grad_attended_ptr,
    grad_states_ptr, grad_scores_ptr, grad_lin_q_ptr, grad_lin_k_ptr, u_sums_ptr, v_sums_ptr,
    counters_ptr, carry_ptr, initial_ptr, left_ptr, doc_ptr, state_doc_ptr,
    N, T, G, slices, width, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr,
    SLICE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr, GATE_E: tl.constexpr, GATE_STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Causal backward, from the last chunk to the first: GATES tiles of the gate, scan, TILES tiles of products.

    Grid and counters like forward's.
    """
    scans = tl.cdiv(width, BLOCK)
    group = tl.program_id(0) // (SLICE * GATES + scans + SLICE * TILES)
    program = tl.program_id(0) % (SLICE * GATES + scans + SLICE * TILES)
    if program < SLICE * GATES:
        i = group * SLICE + program // GATES
        if i < N:
            gate_backward_tile(
                N - 1 - i, program % GATES, uvz_ptr, out_ptr, grad_out_ptr, queries_ptr, grad_uvz_ptr,
                grad_attended_ptr, grad_states_ptr, u_sums_ptr, T, G, stride_b, stride_t,
                E, S, L, C, WHOLE, BLOCK_L, GATE_E, GATE_STEP, 2,
            )  # fmt: skip
            _done(counters_ptr + group)
    elif program < SLICE * GATES + scans:
        slice_ = group - 1
        if (slice_ >= 0) & (slice_ < slices):
            _wait(counters_ptr + slice_, GATES * tl.minimum(SLICE, N - slice_ * SLICE))
            if slice_ > 0:
                _wait(counters_ptr + slices + slice_ - 1, scans)
            _scan_slice(
                slice_, program - SLICE * GATES, grad_states_ptr, carry_ptr, initial_ptr, left_ptr, doc_ptr,
                state_doc_ptr, N, T, G, width, C, True, DOCS, HAS_STATE, HAS_INITIAL, HAS_STATE, SLICE, BLOCK,
            )  # fmt: skip
            _done(counters_ptr + slices + slice_)
    else:
        slice_ = group - 2
        program -= SLICE * GATES + scans
        i = slice_ * SLICE + program // TILES
        if (slice_ >= 0) & (i < N):
            _wait(counters_ptr + slices + slice_, scans)
            products_backward_tile(
                N - 1 - i, program % TILES, uvz_ptr, keys_ptr, None, None, grad_attended_ptr, states_ptr,
                grad_states_ptr, grad_uvz_ptr, grad_scores_ptr, None, grad_lin_q_ptr, grad_lin_k_ptr, v_sums_ptr,
                T, G, stride_b, stride_t, G.to(tl.int64) * width, width,
                E, S, L, C, True, False, WHOLE, TILES, ROWS, BLOCK_L, BLOCK_E, STEP, STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "G"])
def chunk_sums_kernel(
    uvz_ptr, lin_k_ptr, values_ptr, sums_ptr, T, G, stride_b, stride_t,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, N)."""
    chunk_sums_tile(
        tl.program_id(1), tl.program_id(0), uvz_ptr, lin_k_ptr, values_ptr, sums_ptr, T, G, stride_b, stride_t,
        E, L, C, WHOLE, BLOCK_L, BLOCK_E, STEP, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "G"])
def route_kernel(
    sums_ptr, doc_ptr, T, G, stride_g, width,
    C: tl.constexpr, REVERSE: tl.constexpr, FUTURE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The scan of a bidirectional pass with documents, over one of its two routes.

    Columns `width` of the sums (B, G, stride_g) become, in place, what arrives at each chunk. FUTURE: documents are
    followed from behind. Grid: (width / BLOCK, B).
    """
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    carried = tl.zeros([BLOCK], tl.float32)
    sums = sums_ptr + b * G * stride_g + column
    for first in range(0, G, AHEAD):
        steps = ()
        for ahead in tl.static_range(AHEAD):
            i = b * 0 + first + ahead
            g = G - 1 - i if REVERSE else i
            x = tl.load(sums + g * stride_g, mask=column < tl.where(i < G, width, 0), other=0.0)
            steps = steps + (x,)
        for ahead in tl.static_range(AHEAD):
            i = b * 0 + first + ahead
            g = G - 1 - i if REVERSE else i
            present = column < tl.where(i < G, width, 0)
            tl.store(sums + g * stride_g, carried.to(sums_ptr.dtype.element_ty), mask=present)
            g = tl.minimum(tl.maximum(g, 0), G - 1)
            if FUTURE:
                arriving = document(doc_ptr, b, tl.minimum(g + 1, G - 1) * C, T, True)
                keep = document(doc_ptr, b, g * C, T, True) == arriving
            else:
                keep = _handed_on(doc_ptr, None, b, g, T, G, C, True, False)
            carried = steps[ahead].to(tl.float32) + tl.where(keep, carried, 0.0)


@triton.jit(do_not_specialize=["T", "G"])
def output_kernel(
    uvz_ptr, queries_ptr, states_ptr, values_ptr, out_ptr, T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Bidirectional output. Grid: (tiles, N)."""
    output_tile(
        tl.program_id(1), tl.program_id(0), uvz_ptr, queries_ptr, states_ptr, values_ptr, out_ptr, T, G,
        stride_b, stride_t, states_b, states_g, E, L, C, False, WHOLE, ROWS, BLOCK_E, STEP, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "G"])
def gate_backward_kernel(
    uvz_ptr, out_ptr, grad_out_ptr, lin_q_ptr, grad_uvz_ptr, grad_attended_ptr, grad_states_ptr, u_sums_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, N)."""
    gate_backward_tile(
        tl.program_id(1), tl.program_id(0), uvz_ptr, out_ptr, grad_out_ptr, lin_q_ptr, grad_uvz_ptr,
        grad_attended_ptr, grad_states_ptr, u_sums_ptr, T, G, stride_b, stride_t,
        E, S, L, C, WHOLE, BLOCK_L, BLOCK_E, STEP, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "G"])
def products_backward_kernel(
    uvz_ptr, keys_ptr, relu_ptr, doc_ptr, grad_attended_ptr, states_ptr, grad_sums_ptr, grad_uvz_ptr,
    grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr, v_sums_ptr,
    T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, DOCS: tl.constexpr, WHOLE: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Bidirectional. Grid: (TILES, N)."""
    products_backward_tile(
        tl.program_id(1), tl.program_id(0), uvz_ptr, keys_ptr, relu_ptr, doc_ptr, grad_attended_ptr, states_ptr,
        grad_sums_ptr, grad_uvz_ptr, grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr, v_sums_ptr,
        T, G, stride_b, stride_t, states_b, states_g,
        E, S, L, C, False, DOCS, WHOLE, TILES, ROWS, BLOCK_L, BLOCK_E, STEP, STAGES,
    )  # fmt: skip
