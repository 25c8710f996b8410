"""Kernels of mixed chunk attention around its heads: z → rotated queries, keys and scores, and the way back.

Linear queries and keys leave here with everything that documents and means ask of them: a row's weight is in them, and
is 0 where it neither reads nor writes. The products over E (triton_mixed_chunk_products.py) know no documents.

Shape letters: N = B·G chunks, C chunk, S query/key, L = S · routes, E values. A row is a token of a chunk.
"""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from flash_model.ops.triton_math import dot, rotated_head, rotated_head_backward, silu, silu_derivative


@triton.jit
def _angles(starts_ptr, offsets_ptr, g, row, pair, present, H: tl.constexpr):
    """Cosine and sine (rows, pairs): the angle of the chunk's start and that of the row in it, added."""
    start_cos = tl.load(starts_ptr + (2 * g) * H + pair, mask=present, other=0.0)[None, :]
    start_sin = tl.load(starts_ptr + (2 * g + 1) * H + pair, mask=present, other=0.0)[None, :]
    offset = offsets_ptr + (2 * row[:, None]) * H + pair[None, :]
    offset_cos = tl.load(offset, mask=present[None, :], other=0.0)
    offset_sin = tl.load(offset + H, mask=present[None, :], other=0.0)
    return start_cos * offset_cos - start_sin * offset_sin, start_sin * offset_cos + start_cos * offset_sin


@triton.jit
def _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E: tl.constexpr, H: tl.constexpr):
    """The two halves of z (rows, pairs); 0 behind the end of the sequence."""
    z = uvz_ptr + b.to(tl.int64) * stride_b + t.to(tl.int64)[:, None] * stride_t + 2 * E + pair[None, :]
    mask = (t < T)[:, None] & present[None, :]
    return tl.load(z, mask=mask, other=0.0).to(tl.float32), tl.load(z + H, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def document(doc_ptr, b, t, T, DOCS: tl.constexpr):
    """The document of position t; padding joins the last one."""
    if DOCS:
        return tl.load(doc_ptr + b.to(tl.int64) * T + tl.minimum(t, T - 1)).to(tl.int64)
    return (t * 0).to(tl.int64)


@triton.jit
def _reading(
    doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G,
    C: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Weights of the rows t of chunk g: they read what comes from before, from behind, their own chunk; they write.

    Chunk boundaries are fixed and ids never decrease, so only a chunk's first document reads what comes from before it
    and only its last is carried on; the other way round from behind.
    """
    ones = tl.full(t.shape, 1.0, tl.float32)
    read_past, read_future, own, write_past, write_future = ones / G, ones * 0.0, ones * 0.0, ones / C, ones * 0.0
    if CAUSAL or DOCS:
        doc = document(doc_ptr, b, t, T, DOCS)
        before = document(doc_ptr, b, tl.maximum(g * C - 1, 0), T, DOCS)
        other = tl.arange(0, G2)
        if DOCS:
            ends = document(doc_ptr, b, other * C + C - 1, T, DOCS)
            past = tl.sum(((other < g) & (ends == before)).to(tl.int32), 0)
        else:
            past = g
        if HAS_STATE:
            state_doc = tl.load(state_doc_ptr + b)
            continues = (g == 0) | (document(doc_ptr, b, g * 0 + C - 1, T, DOCS) == state_doc)
            before = tl.where(g == 0, state_doc, before)
            past += tl.where(continues & (before == state_doc), tl.load(state_count_ptr + b), 0).to(tl.int32)
        past = tl.where(doc == before, past, 0).to(tl.float32)
        total = past
        if not CAUSAL:
            behind = document(doc_ptr, b, tl.minimum(g + 1, G - 1) * C, T, DOCS)
            begins = document(doc_ptr, b, tl.minimum(other, G - 1) * C, T, DOCS)
            future = tl.sum(((other > g) & (other < G) & (begins == behind)).to(tl.int32), 0)
            future = tl.where(doc == behind, future, 0).to(tl.float32)
            total = 1.0 + past + future
            own = 1.0 / (total * C)
            read_future = tl.where(future > 0, 1.0 / total, 0.0)
            write_future = tl.where(doc == document(doc_ptr, b, g * C, T, DOCS), ones / C, 0.0)
        read_past = tl.where(past > 0, 1.0 / tl.maximum(total, 1.0), 0.0)
        write_past = tl.where(doc == document(doc_ptr, b, g * C + C - 1, T, DOCS), ones / C, 0.0)
    return read_past, read_future, own, write_past, write_future


@triton.jit
def _store_pair(ptr, x1, x2, mask, H: tl.constexpr):
    tl.store(ptr, x1.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + H, x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pair(ptr, mask, H: tl.constexpr):
    return tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + H, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "G"])
def heads_kernel(
    uvz_ptr, gamma_ptr, beta_ptr, doc_ptr, state_count_ptr, state_doc_ptr, starts_ptr, offsets_ptr,
    quad_q_ptr, quad_k_ptr, own_q_ptr, own_k_ptr, lin_q_ptr, lin_k_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, H2: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr, WIDTH_Q: tl.constexpr, WIDTH_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """z → quad_q, quad_k (N, C, S), and with their weights lin_q, lin_k: L columns of rows of WIDTH_Q and WIDTH_K.

    Where own chunks are read linearly, own_q and own_k (N, C, S) are that product's factors. Grid: (C / ROWS, N).
    """
    H: tl.constexpr = S // 2
    TWO: tl.constexpr = DOCS and not CAUSAL
    n = tl.program_id(1)
    b, g = n // G, n % G
    pair = tl.arange(0, H2)
    present = pair < H
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = g * C + row
    read_past, read_future, own, write_past, write_future = _reading(
        doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G, C, G2, CAUSAL, DOCS, HAS_STATE
    )
    z1, z2 = _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E, H)
    a1, a2 = silu(z1), silu(z2)
    cos, sin = _angles(starts_ptr, offsets_ptr, g, row, pair, present, H)
    mask = present[None, :]
    place = (n.to(tl.int64) * C + row)[:, None] * S + pair[None, :]
    place_q = (n.to(tl.int64) * C + row)[:, None] * WIDTH_Q + pair[None, :]
    place_k = (n.to(tl.int64) * C + row)[:, None] * WIDTH_K + pair[None, :]

    x1, x2 = rotated_head(a1, a2, gamma_ptr, beta_ptr, 0, pair, present, cos, sin, S)
    _store_pair(quad_q_ptr + place, x1, x2, mask, H)
    x1, x2 = rotated_head(a1, a2, gamma_ptr, beta_ptr, 1, pair, present, cos, sin, S)
    _store_pair(quad_k_ptr + place, x1, x2, mask, H)
    x1, x2 = rotated_head(a1, a2, gamma_ptr, beta_ptr, 2, pair, present, cos, sin, S)
    _store_pair(lin_q_ptr + place_q, x1 * read_past[:, None], x2 * read_past[:, None], mask, H)
    if TWO:
        _store_pair(lin_q_ptr + place_q + S, x1 * read_future[:, None], x2 * read_future[:, None], mask, H)
        _store_pair(own_q_ptr + place, x1 * own[:, None], x2 * own[:, None], mask, H)
    x1, x2 = rotated_head(a1, a2, gamma_ptr, beta_ptr, 3, pair, present, cos, sin, S)
    _store_pair(lin_k_ptr + place_k, x1 * write_past[:, None], x2 * write_past[:, None], mask, H)
    if TWO:
        _store_pair(lin_k_ptr + place_k + S, x1 * write_future[:, None], x2 * write_future[:, None], mask, H)
        _store_pair(own_k_ptr + place, x1, x2, mask, H)


@triton.jit(do_not_specialize=["T", "G"])
def scores_kernel(
    bias_ptr, doc_ptr, quad_q_ptr, quad_k_ptr, own_q_ptr, own_k_ptr, weights_ptr, relu_ptr, T, G,
    S: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr, TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weights: relu(quad_q quad_kᵀ / C + bias)², with own_q own_kᵀ where own chunks are read linearly.

    C columns, keys (TRANSPOSED: queries), of rows of WIDTH, queries (keys). relu (N, C keys, C queries) is written
    only with own_q and TRANSPOSED. Blocks above the diagonal stay unwritten, in units of ROWS. Grid: (block pairs, N).
    """
    TWO: tl.constexpr = DOCS and not CAUSAL
    BLOCKS: tl.constexpr = C // ROWS
    n = tl.program_id(1)
    b, g = n // G, n % G
    query_block, key_block = pair_of_blocks(tl.program_id(0), BLOCKS, CAUSAL)
    query, key = query_block * ROWS + tl.arange(0, ROWS), key_block * ROWS + tl.arange(0, ROWS)
    if TRANSPOSED:
        row, column, row_ptr, column_ptr = key, query, quad_k_ptr, quad_q_ptr
        distance = row[:, None] - column[None, :]
    else:
        row, column, row_ptr, column_ptr = query, key, quad_q_ptr, quad_k_ptr
        distance = column[None, :] - row[:, None]
    chunk = n.to(tl.int64) * C
    scores = _product(row_ptr, column_ptr, chunk + row, chunk + column, S) / C
    scores += tl.load(bias_ptr + (distance + C - 1)).to(tl.float32)
    allowed = distance < C
    if CAUSAL:
        allowed = distance <= 0
    if DOCS:
        row_doc = document(doc_ptr, b, g * C + row, T, DOCS)
        allowed = allowed & (row_doc[:, None] == document(doc_ptr, b, g * C + column, T, DOCS)[None, :])
    relu = tl.where(allowed, tl.maximum(scores, 0.0), 0.0)
    weights = relu * relu
    if TWO:
        if TRANSPOSED:
            tl.store(relu_ptr + (chunk + row)[:, None] * C + column[None, :], relu.to(relu_ptr.dtype.element_ty))
            linear = _product(own_k_ptr, own_q_ptr, chunk + row, chunk + column, S)
        else:
            linear = _product(own_q_ptr, own_k_ptr, chunk + row, chunk + column, S)
        weights += tl.where(allowed, linear, 0.0)
    place = weights_ptr + (chunk + row)[:, None] * WIDTH + column[None, :]
    tl.store(place, weights.to(weights_ptr.dtype.element_ty))


@triton.jit
def pair_of_blocks(index, BLOCKS: tl.constexpr, CAUSAL: tl.constexpr):
    """The query's and the key's block of the index-th pair; causal ones only where the query may read the key."""
    if CAUSAL:
        query_block = index * 0
        for later in tl.static_range(1, BLOCKS):
            query_block = tl.where(index >= later * (later + 1) // 2, later, query_block)
        return query_block, index - query_block * (query_block + 1) // 2
    else:  # noqa: RET505
        return index // BLOCKS, index % BLOCKS


@triton.jit
def _product(a_ptr, b_ptr, a_row, b_row, S: tl.constexpr):
    """a · bᵀ of rows of two (…, S) tensors."""
    acc = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for first in tl.static_range(0, S, 64):
        feature = first + tl.arange(0, 64)
        a = tl.load(a_ptr + a_row[:, None] * S + feature[None, :])
        acc = dot(a, tl.trans(tl.load(b_ptr + b_row[:, None] * S + feature[None, :])), acc)
    return acc


@triton.jit
def quad_backward_kernel(
    quad_q_ptr, quad_k_ptr, grad_ptr, grad_q_ptr, grad_k_ptr,
    S: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k (N, C, S) of scores = q kᵀ, whose transposed gradient is grad (N, C keys, C queries).

    Grid: (2 · C / ROWS · S / BLOCK_S, N).
    """
    chunk = tl.program_id(1).to(tl.int64) * C
    block = tl.program_id(0) // 2
    feature = block % (S // BLOCK_S) * BLOCK_S + tl.arange(0, BLOCK_S)
    first_row = block // (S // BLOCK_S) * ROWS
    row = first_row + tl.arange(0, ROWS)
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, BLOCK_S], tl.float32)
    place = (chunk + row)[:, None] * S + feature[None, :]
    if tl.program_id(0) % 2 == 0:
        end = C
        if CAUSAL:
            end = first_row + ROWS
        for first in tl.range(0, end, STEP, num_stages=STAGES):
            grad = tl.load(grad_ptr + (chunk + first + step)[None, :] * C + row[:, None])
            acc = dot(grad, tl.load(quad_k_ptr + (chunk + first + step)[:, None] * S + feature[None, :]), acc)
        tl.store(grad_q_ptr + place, acc.to(grad_q_ptr.dtype.element_ty))
    else:
        start = 0
        if CAUSAL:
            start = first_row
        for first in tl.range(start, C, STEP, num_stages=STAGES):
            grad = tl.load(grad_ptr + (chunk + row)[:, None] * C + (first + step)[None, :])
            acc = dot(grad, tl.load(quad_q_ptr + (chunk + first + step)[:, None] * S + feature[None, :]), acc)
        tl.store(grad_k_ptr + place, acc.to(grad_k_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "G"])
def heads_backward_kernel(
    uvz_ptr, gamma_ptr, doc_ptr, state_count_ptr, state_doc_ptr, starts_ptr, offsets_ptr,
    grad_quad_q_ptr, grad_quad_k_ptr, grad_own_q_ptr, grad_own_k_ptr, grad_lin_q_ptr, grad_lin_k_ptr,
    grad_uvz_ptr, partial_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, H2: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the rotated heads → gradient of z, and partial sums (programs, 9, S) of gamma's, beta's and z's.

    Grid: (C / ROWS, N).
    """
    H: tl.constexpr = S // 2
    TWO: tl.constexpr = DOCS and not CAUSAL
    L: tl.constexpr = 2 * S if TWO else S
    n = tl.program_id(1)
    b, g = n // G, n % G
    pair = tl.arange(0, H2)
    present = pair < H
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = g * C + row
    read_past, read_future, own, write_past, write_future = _reading(
        doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G, C, G2, CAUSAL, DOCS, HAS_STATE
    )
    z1, z2 = _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E, H)
    a1, a2 = silu(z1), silu(z2)
    cos, sin = _angles(starts_ptr, offsets_ptr, g, row, pair, present, H)
    partial = partial_ptr + (n.to(tl.int64) * (C // ROWS) + tl.program_id(0)) * 9 * S + pair
    place = (n.to(tl.int64) * C + row)[:, None] * S + pair[None, :]
    place_lin = (n.to(tl.int64) * C + row)[:, None] * L + pair[None, :]
    here = present[None, :]

    x1, x2 = _load_pair(grad_quad_q_ptr + place, here, H)
    x1, x2 = x1.to(tl.float32) / C, x2.to(tl.float32) / C
    grad_a1, grad_a2 = rotated_head_backward(
        x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present, 0, 4, S
    )  # fmt: skip
    x1, x2 = _load_pair(grad_quad_k_ptr + place, here, H)
    x1, x2 = x1.to(tl.float32) / C, x2.to(tl.float32) / C
    x1, x2 = rotated_head_backward(
        x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present, 1, 4, S
    )  # fmt: skip
    grad_a1, grad_a2 = grad_a1 + x1, grad_a2 + x2

    x1, x2 = _load_pair(grad_lin_q_ptr + place_lin, here, H)
    x1, x2 = x1 * read_past[:, None], x2 * read_past[:, None]
    if TWO:
        y1, y2 = _load_pair(grad_lin_q_ptr + place_lin + S, here, H)
        x1, x2 = x1 + y1 * read_future[:, None], x2 + y2 * read_future[:, None]
        y1, y2 = _load_pair(grad_own_q_ptr + place, here, H)
        x1, x2 = x1 + y1 * own[:, None], x2 + y2 * own[:, None]
    x1, x2 = rotated_head_backward(
        x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present, 2, 4, S
    )  # fmt: skip
    grad_a1, grad_a2 = grad_a1 + x1, grad_a2 + x2

    x1, x2 = _load_pair(grad_lin_k_ptr + place_lin, here, H)
    x1, x2 = x1 * write_past[:, None], x2 * write_past[:, None]
    if TWO:
        y1, y2 = _load_pair(grad_lin_k_ptr + place_lin + S, here, H)
        x1, x2 = x1 + y1 * write_future[:, None], x2 + y2 * write_future[:, None]
        y1, y2 = _load_pair(grad_own_k_ptr + place, here, H)
        x1, x2 = x1 + y1, x2 + y2
    x1, x2 = rotated_head_backward(
        x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present, 3, 4, S
    )  # fmt: skip

    grad_z1, grad_z2 = (grad_a1 + x1) * silu_derivative(z1), (grad_a2 + x2) * silu_derivative(z2)
    tl.store(partial + 8 * S, tl.sum(grad_z1, 0), mask=present)
    tl.store(partial + 8 * S + H, tl.sum(grad_z2, 0), mask=present)
    grad_z = (b.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * E + S) + 2 * E + pair[None, :]
    _store_pair(grad_uvz_ptr + grad_z, grad_z1, grad_z2, (t < T)[:, None] & present[None, :], H)


@triton.jit(do_not_specialize=["head_rows", "u_rows", "v_rows"])
def partial_sums_kernel(
    heads_ptr, u_ptr, v_ptr, sums_ptr, head_rows, u_rows, v_rows,
    E: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums (PARTS, 9S + 2E): those of a part of the rows of heads (…, 9S), u (…, E) and v (…, E).

    Grid: (columns / COLUMNS, PARTS).
    """
    WIDTH: tl.constexpr = 9 * S + 2 * E
    column = tl.program_id(0) * COLUMNS
    if column < 9 * S:
        acc = _sum_part(heads_ptr + column, head_rows, 9 * S, PARTS, COLUMNS, ROWS)
    elif column < 9 * S + E:
        acc = _sum_part(u_ptr + column - 9 * S, u_rows, E, PARTS, COLUMNS, ROWS)
    else:
        acc = _sum_part(v_ptr + column - 9 * S - E, v_rows, E, PARTS, COLUMNS, ROWS)
    tl.store(sums_ptr + tl.program_id(1) * WIDTH + column + tl.arange(0, COLUMNS), acc)


@triton.jit
def _sum_part(
    ptr, rows, width: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Sums (COLUMNS,) over this program's part of the rows of `width` numbers."""
    column = tl.arange(0, COLUMNS)
    span = tl.cdiv(rows, PARTS)
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, rows)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        place = ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        acc += tl.load(place, mask=(row < end)[:, None], other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def parameter_sums_kernel(
    sums_ptr, gamma_ptr, beta_ptr, tokens_ptr,
    E: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over PARTS of what partial_sums_kernel wrote: gamma's and beta's gradients (4S,), uvz's (2E + S,).

    Grid: (columns / COLUMNS,).
    """
    WIDTH: tl.constexpr = 9 * S + 2 * E
    first = tl.program_id(0) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    total = tl.sum(tl.load(sums_ptr + tl.arange(0, PARTS)[:, None] * WIDTH + column[None, :]), 0)
    if first < 4 * S:
        tl.store(gamma_ptr + column, total.to(gamma_ptr.dtype.element_ty))
    elif first < 8 * S:
        tl.store(beta_ptr + column - 4 * S, total.to(beta_ptr.dtype.element_ty))
    elif first < 9 * S:
        tl.store(tokens_ptr + column - 8 * S + 2 * E, total)
    else:
        tl.store(tokens_ptr + column - 9 * S, total)


@triton.jit
def diagonals_kernel(square_ptr, sums_ptr, C: tl.constexpr, CAUSAL: tl.constexpr):
    """Sums over the diagonals of (C keys, C queries): element key − query + C − 1. Grid: (2C − 1,)."""
    offset = tl.program_id(0) - (C - 1)
    query = tl.arange(0, C)
    key = query + offset
    mask = (key >= 0) & (key < C)
    if CAUSAL:
        mask = mask & (key <= query)
    total = tl.sum(tl.load(square_ptr + key * C + query, mask=mask, other=0.0), 0)
    tl.store(sums_ptr + tl.program_id(0), total.to(sums_ptr.dtype.element_ty))
