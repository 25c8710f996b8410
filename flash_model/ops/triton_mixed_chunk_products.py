"""Products of mixed chunk attention over its values: chunk sums, output, and their adjoints, one tile at a time.

The kernels that walk over the tiles are in triton_mixed_chunk_pipeline.py. Tiles know no documents: rows that do not
read or write have weight 0 in lin_q, lin_k and weights.

Shape letters: N = B·G chunks, C chunk, L width of the linear queries and keys, E values. `attended` is
weights · V + lin_q · state with V = SiLU(v), and the output SiLU(u) · attended.
"""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from flash_model.ops.triton_math import activate, dot, gate_backward, gated, load_rows, silu_derivative, store_rows
from flash_model.ops.triton_mixed_chunk_heads import document, pair_of_blocks


@triton.jit
def _rows(ptr, b, t, stride_b, stride_t):
    """Pointers to the rows t of sequence b, (rows, 1)."""
    return ptr + b.to(tl.int64) * stride_b + t.to(tl.int64)[:, None] * stride_t


@triton.jit
def token_rows(ptr, b, t, T, WIDTH: tl.constexpr):
    """The same in a contiguous (B, T, WIDTH): T · WIDTH may be more than an int32 holds."""
    return _rows(ptr, b, t, T.to(tl.int64) * WIDTH, WIDTH)


@triton.jit
def chunk_sums_tile(
    n, tile, uvz_ptr, lin_k_ptr, values_ptr, sums_ptr, T, G, stride_b, stride_t,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums (N, L, E) = lin_kᵀ V of every chunk, and V = SiLU(v) itself, (N, C, E). Tiles: E / BLOCK_E · L / BLOCK_L."""
    b, g = n // G, n % G
    block_l = tile % (L // BLOCK_L)
    column = tile // (L // BLOCK_L) * BLOCK_E + tl.arange(0, BLOCK_E)
    feature = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    step = tl.arange(0, STEP)
    chunk = n.to(tl.int64) * C
    lin_k = lin_k_ptr + chunk * L + step[None, :] * L + feature[:, None]
    pre_activations = _rows(uvz_ptr, b, g * C + step, stride_b, stride_t) + E + column[None, :]
    values = values_ptr + chunk * E + step[:, None] * E + column[None, :]
    for first in tl.range(0, C, STEP, num_stages=STAGES):
        v = activate(load_rows(pre_activations, (g * C + first + step < T)[:, None], WHOLE))
        if block_l == 0:
            tl.store(values, v)
        acc = dot(tl.load(lin_k), v, acc)
        lin_k += STEP * L
        pre_activations += STEP * stride_t
        values += STEP * E
    place = n.to(tl.int64) * L * E + feature[:, None] * E + column[None, :]
    tl.store(sums_ptr + place, acc.to(sums_ptr.dtype.element_ty))


@triton.jit
def output_tile(
    n, tile, uvz_ptr, queries_ptr, states_ptr, values_ptr, out_ptr, T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, T, E) = SiLU(u) · ([lin_q, weights] · [state; V]). Tiles: E / BLOCK_E · C / ROWS.

    queries (N, C, L + C) holds lin_q beside weights, so that both products are one loop.
    """
    b, g = n // G, n % G
    first_row = tile % (C // ROWS) * ROWS
    column = tile // (C // ROWS) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = first_row + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    t = g * C + row
    chunk = n.to(tl.int64) * C
    queries = queries_ptr + (chunk + row)[:, None] * (L + C) + step[None, :]
    states = states_ptr + b.to(tl.int64) * states_b + g.to(tl.int64) * states_g
    values = values_ptr + chunk * E
    acc = tl.zeros([ROWS, BLOCK_E], tl.float32)
    end = L + C
    if CAUSAL:
        end = L + first_row + ROWS
    for first in tl.range(0, end, STEP, num_stages=STAGES):
        base = tl.where(first < L, states + first * E, values + (first - L) * E)
        acc = dot(tl.load(queries + first), tl.load(base + step[:, None] * E + column[None, :]), acc)

    gates = _rows(uvz_ptr, b, t, stride_b, stride_t) + column[None, :]
    place = (b.to(tl.int64) * T + t.to(tl.int64))[:, None] * E + column[None, :]
    inside = (t < T)[:, None]
    store_rows(out_ptr + place, gated(load_rows(gates, inside, WHOLE), acc), inside, WHOLE)


@triton.jit
def gate_backward_tile(
    n, tile, uvz_ptr, out_ptr, grad_out_ptr, lin_q_ptr, grad_uvz_ptr, grad_attended_ptr, grad_states_ptr, partial_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gate's adjoint: gradients of u and, (N, C, E), of attended; grad_states (N, L, E) = lin_qᵀ grad_attended.

    partial (N, E): sums of u's gradient over the chunk's tokens. Tiles: E / BLOCK_E · L / BLOCK_L.
    """
    b, g = n // G, n % G
    block_l = tile % (L // BLOCK_L)
    column = tile // (L // BLOCK_L) * BLOCK_E + tl.arange(0, BLOCK_E)
    feature = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    step = tl.arange(0, STEP)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    lin_q = lin_q_ptr + n.to(tl.int64) * C * L + step[None, :] * L + feature[:, None]
    for first in tl.range(0, C, STEP, num_stages=STAGES):
        t = g * C + first + step
        inside = (t < T)[:, None]
        u = load_rows(_rows(uvz_ptr, b, t, stride_b, stride_t) + column[None, :], inside, WHOLE)
        grad_out = load_rows(token_rows(grad_out_ptr, b, t, T, E) + column[None, :], inside, WHOLE)
        q = tl.load(lin_q)
        grad_attended = gated(u, grad_out).to(q.dtype)
        acc = dot(q, grad_attended, acc)
        lin_q += STEP * L
        if block_l == 0:
            out = load_rows(token_rows(out_ptr, b, t, T, E) + column[None, :], inside, WHOLE)
            grad_u = gate_backward(u, out, grad_out)
            total += tl.sum(grad_u, 0)
            place = token_rows(grad_uvz_ptr, b, t, T, 2 * E + S) + column[None, :]
            store_rows(place, grad_u, inside, WHOLE)
            row = n.to(tl.int64) * C + first + step
            tl.store(grad_attended_ptr + row[:, None] * E + column[None, :], grad_attended)
    place = n.to(tl.int64) * L * E + feature[:, None] * E + column[None, :]
    tl.store(grad_states_ptr + place, acc.to(grad_states_ptr.dtype.element_ty))
    if block_l == 0:
        tl.store(partial_ptr + n.to(tl.int64) * E + column, total)


@triton.jit
def values_backward_tile(
    n, tile, uvz_ptr, keys_ptr, grad_attended_ptr, grad_sums_ptr, grad_uvz_ptr, partial_ptr,
    T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of v = SiLU′(v) · ([weightsᵀ, lin_k] · [grad_attended; grad_sums]). Tiles: E / BLOCK_E · C / ROWS.

    keys (N, C, C + L) holds weightsᵀ beside lin_k. partial (N · C / ROWS, E): sums of the gradient over the rows.
    """
    b, g = n // G, n % G
    first_row = tile % (C // ROWS) * ROWS
    column = tile // (C // ROWS) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = first_row + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    t = g * C + row
    values = _rows(uvz_ptr, b, t, stride_b, stride_t) + E + column[None, :]

    chunk = n.to(tl.int64) * C
    keys = keys_ptr + (chunk + row)[:, None] * (C + L) + step[None, :]
    grads = grad_attended_ptr + chunk * E
    sums = grad_sums_ptr + b.to(tl.int64) * states_b + g.to(tl.int64) * states_g
    acc = tl.zeros([ROWS, BLOCK_E], tl.float32)
    start = 0
    if CAUSAL:
        start = first_row
    for first in tl.range(start, C + L, STEP, num_stages=STAGES):
        base = tl.where(first < C, grads + first * E, sums + (first - C) * E)
        acc = dot(tl.load(keys + first), tl.load(base + step[:, None] * E + column[None, :]), acc)

    inside = (t < T)[:, None]
    place = token_rows(grad_uvz_ptr, b, t, T, 2 * E + S) + E + column[None, :]
    grad_v = acc * silu_derivative(load_rows(values, inside, WHOLE))
    if not WHOLE:
        grad_v = tl.where(inside, grad_v, 0.0)
    store_rows(place, grad_v, inside, WHOLE)
    partial = partial_ptr + (n.to(tl.int64) * (C // ROWS) + first_row // ROWS) * E + column
    tl.store(partial, tl.sum(grad_v, 0))


@triton.jit
def _contract(
    x, y, x_row, T,
    E: tl.constexpr, SILU: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """X (M, E) · Y (N, E)ᵀ, with SiLU on X; x and y point at their first STEP columns."""
    acc = tl.zeros([M, N], tl.float32)
    for _ in tl.range(0, E, STEP, num_stages=STAGES):
        other = tl.load(y)
        if SILU:
            acc = dot(activate(load_rows(x, (x_row < T)[:, None], WHOLE)), tl.trans(other), acc)
        else:
            acc = dot(tl.load(x), tl.trans(other), acc)
        x += STEP
        y += STEP
    return acc


@triton.jit
def contractions_tile(
    n, tile, uvz_ptr, keys_ptr, relu_ptr, doc_ptr, grad_attended_ptr, states_ptr, grad_sums_ptr,
    grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr,
    T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, L: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All that sums over E. A tile is one block of one of the following.

    scores   (keys, queries)  V · grad_attendedᵀ, times the derivative of relu(s)²: grad_scores (N, C keys, C queries),
             and without that factor, where own chunks are read linearly, grad_weights
    lin_q    (queries, L)  grad_attended · statesᵀ          lin_k    (keys, L)  V · grad_sumsᵀ
    """
    BLOCKS: tl.constexpr = C // ROWS
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2 if CAUSAL else BLOCKS * BLOCKS
    LINEAR: tl.constexpr = BLOCKS * (L // BLOCK_L)
    b, g = n // G, n % G
    chunk = n.to(tl.int64) * C
    dtype = grad_lin_q_ptr.dtype.element_ty
    step = tl.arange(0, STEP)
    row = tl.arange(0, ROWS)
    if tile < PAIRS:
        query_block, key_block = pair_of_blocks(tile, BLOCKS, CAUSAL)
        key, query = key_block * ROWS + row, query_block * ROWS + row
        t_key = g * C + key
        x = _rows(uvz_ptr, b, t_key, stride_b, stride_t) + E + step[None, :]
        y = grad_attended_ptr + (chunk + query)[:, None] * E + step[None, :]
        grad = _contract(x, y, t_key, T, E, True, WHOLE, ROWS, ROWS, STEP, STAGES)
        place = (chunk + key)[:, None] * C + query[None, :]
        if DOCS and not CAUSAL:
            relu = tl.load(relu_ptr + place).to(tl.float32)
            query_doc = document(doc_ptr, b, g * C + query, T, DOCS)
            same = document(doc_ptr, b, t_key, T, DOCS)[:, None] == query_doc[None, :]
            tl.store(grad_weights_ptr + place, tl.where(same, grad, 0.0).to(dtype))
        else:
            # The weights are relu² and 0 where a query may not read.
            relu = tl.sqrt(tl.load(keys_ptr + (chunk + key)[:, None] * (C + L) + query[None, :]).to(tl.float32))
        tl.store(grad_scores_ptr + place, (grad * 2.0 * relu).to(dtype))
    else:
        block = (tile - PAIRS) % LINEAR
        row = block // (L // BLOCK_L) * ROWS + row
        feature = block % (L // BLOCK_L) * BLOCK_L + tl.arange(0, BLOCK_L)
        state = b.to(tl.int64) * states_b + g.to(tl.int64) * states_g + feature[:, None] * E + step[None, :]
        place_lin = (chunk + row)[:, None] * L + feature[None, :]
        if tile < PAIRS + LINEAR:
            left = grad_attended_ptr + (chunk + row)[:, None] * E + step[None, :]
            grad_lin_q = _contract(left, states_ptr + state, row, T, E, False, WHOLE, ROWS, BLOCK_L, STEP, STAGES)
            tl.store(grad_lin_q_ptr + place_lin, grad_lin_q.to(dtype))
        else:
            t = g * C + row
            values = _rows(uvz_ptr, b, t, stride_b, stride_t) + E + step[None, :]
            grad_lin_k = _contract(values, grad_sums_ptr + state, t, T, E, True, WHOLE, ROWS, BLOCK_L, STEP, STAGES)
            tl.store(grad_lin_k_ptr + place_lin, grad_lin_k.to(dtype))


@triton.jit
def products_backward_tile(
    n, tile, uvz_ptr, keys_ptr, relu_ptr, doc_ptr, grad_attended_ptr, states_ptr, grad_sums_ptr, grad_uvz_ptr,
    grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr, v_sums_ptr,
    T, G, stride_b, stride_t, states_b, states_g,
    E: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of the TILES of a chunk: of everything that sums over E, then of the gradient of v."""
    CONTRACTIONS: tl.constexpr = TILES - (E // BLOCK_E) * (C // ROWS)
    if tile < CONTRACTIONS:
        contractions_tile(
            n, tile, uvz_ptr, keys_ptr, relu_ptr, doc_ptr, grad_attended_ptr, states_ptr, grad_sums_ptr,
            grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr, T, G, stride_b, stride_t,
            states_b, states_g, E, L, C, CAUSAL, DOCS, WHOLE, ROWS, BLOCK_L, STEP, STAGES,
        )  # fmt: skip
    else:
        values_backward_tile(
            n, tile - CONTRACTIONS, uvz_ptr, keys_ptr, grad_attended_ptr, grad_sums_ptr, grad_uvz_ptr, v_sums_ptr,
            T, G, stride_b, stride_t, states_b, states_g, E, S, L, C, CAUSAL, WHOLE, ROWS, BLOCK_E, STEP, STAGES,
        )  # fmt: skip
