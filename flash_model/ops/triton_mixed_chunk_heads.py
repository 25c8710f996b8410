"""Kernels of mixed chunk attention around its heads: z → rotated queries, keys and scores, and the way back.

Linear queries and keys leave here with everything that documents and means ask of them: a row's weight is in them, and
is 0 where it neither reads nor writes. The products over E (triton_mixed_chunk_products.py) know no documents.

Shape letters: N = B·G chunks, C chunk, S query/key, L = S · routes, E values. A row is a token of a chunk.
"""

import triton
import triton.language as tl

from flash_model.ops.triton_math import dot, rotate, silu, silu_derivative


@triton.jit
def _angles(starts_ptr, offsets_ptr, g, row, pair, present, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine (rows, pairs): the angle of the chunk's start and that of the row in it, added."""
    start_cos = tl.load(starts_ptr + (2 * g) * H + pair, mask=present, other=0.0)[None, :]
    start_sin = tl.load(starts_ptr + (2 * g + 1) * H + pair, mask=present, other=0.0)[None, :]
    offset = offsets_ptr + (2 * row[:, None]) * H + pair[None, :]
    offset_cos = tl.load(offset, mask=present[None, :], other=0.0)
    offset_sin = tl.load(offset + H, mask=present[None, :], other=0.0)
    return start_cos * offset_cos - start_sin * offset_sin, start_sin * offset_cos + start_cos * offset_sin


@triton.jit
def _head(a1, a2, gamma_ptr, beta_ptr, head: tl.constexpr, pair, present, cos, sin, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """RoPE(activation · gamma + beta) of one head, as its two halves."""
    first = head * S + pair
    second = first + S // 2
    gamma1 = tl.load(gamma_ptr + first, mask=present, other=0.0).to(tl.float32)[None, :]
    gamma2 = tl.load(gamma_ptr + second, mask=present, other=0.0).to(tl.float32)[None, :]
    beta1 = tl.load(beta_ptr + first, mask=present, other=0.0).to(tl.float32)[None, :]
    beta2 = tl.load(beta_ptr + second, mask=present, other=0.0).to(tl.float32)[None, :]
    return rotate(a1 * gamma1 + beta1, a2 * gamma2 + beta2, cos, sin)


@triton.jit
def _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two halves of z (rows, pairs); 0 behind the end of the sequence."""
    z = uvz_ptr + b.to(tl.int64) * stride_b + t.to(tl.int64)[:, None] * stride_t + 2 * E + pair[None, :]
    mask = (t < T)[:, None] & present[None, :]
    return tl.load(z, mask=mask, other=0.0).to(tl.float32), tl.load(z + H, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _document(doc_ptr, b, t, T, DOCS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The document of position t; padding joins the last one."""
    if DOCS:
        return tl.load(doc_ptr + b.to(tl.int64) * T + tl.minimum(t, T - 1)).to(tl.int64)
    return (t * 0).to(tl.int64)


@triton.jit
def _reading(  # type: ignore[no-untyped-def]
    doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G,
    C: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Weights of the rows t of chunk g: they read what comes from before, from behind, their own chunk; they write.

    Chunk boundaries are fixed and ids never decrease, so only a chunk's first document reads what comes from before it
    and only its last is carried on; the other way round from behind.
    """
    ones = tl.full(t.shape, 1.0, tl.float32)
    if not CAUSAL and not DOCS:
        return ones / G, ones * 0.0, ones * 0.0, ones / C, ones * 0.0
    doc = _document(doc_ptr, b, t, T, DOCS)
    last = _document(doc_ptr, b, g * C + C - 1, T, DOCS)
    before = _document(doc_ptr, b, tl.maximum(g * C - 1, 0), T, DOCS)
    if DOCS:
        other = tl.arange(0, G2)
        ends = _document(doc_ptr, b, other * C + C - 1, T, DOCS)
        past = tl.sum(((other < g) & (ends == before)).to(tl.int32), 0)
    else:
        past = g
    if HAS_STATE:
        state_doc = tl.load(state_doc_ptr + b)
        continues = (g == 0) | (_document(doc_ptr, b, g * 0 + C - 1, T, DOCS) == state_doc)
        before = tl.where(g == 0, state_doc, before)
        past += tl.where(continues & (before == state_doc), tl.load(state_count_ptr + b), 0).to(tl.int32)
    past = tl.where(doc == before, past, 0).to(tl.float32)
    write_past = tl.where(doc == last, ones / C, 0.0)
    if CAUSAL:
        return tl.where(past > 0, 1.0 / tl.maximum(past, 1.0), 0.0), ones * 0.0, ones * 0.0, write_past, ones * 0.0
    first = _document(doc_ptr, b, g * C, T, DOCS)
    behind = _document(doc_ptr, b, tl.minimum(g + 1, G - 1) * C, T, DOCS)
    begins = _document(doc_ptr, b, tl.minimum(other, G - 1) * C, T, DOCS)
    future = tl.sum(((other > g) & (other < G) & (begins == behind)).to(tl.int32), 0)
    future = tl.where(doc == behind, future, 0).to(tl.float32)
    mean = 1.0 / (1.0 + past + future)
    return (
        tl.where(past > 0, mean, 0.0),
        tl.where(future > 0, mean, 0.0),
        mean / C,
        write_past,
        tl.where(doc == first, ones / C, 0.0),
    )


@triton.jit
def _store_pair(ptr, x1, x2, mask, H: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(ptr, x1.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + H, x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pair(ptr, mask, H: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + H, mask=mask, other=0.0)


@triton.jit
def _scores(
    q1, q2, k1, k2, bias_ptr, row, key, doc, key_doc, C: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """relu(q kᵀ / C + bias) of queries (rows) on keys, 0 where a query may not read, and where it may."""
    scores = dot(q2, tl.trans(k2), dot(q1, tl.trans(k1), tl.zeros([row.shape[0], key.shape[0]], tl.float32)))
    scores = scores / C + tl.load(bias_ptr + (key[None, :] - row[:, None] + C - 1)).to(tl.float32)
    allowed = (key[None, :] >= 0) & (row[:, None] >= 0)
    if CAUSAL:
        allowed = allowed & (key[None, :] <= row[:, None])
    if DOCS:
        allowed = allowed & (key_doc[None, :] == doc[:, None])
    return tl.where(allowed, tl.maximum(scores, 0.0), 0.0), allowed


@triton.jit
def heads_kernel(  # type: ignore[no-untyped-def]
    uvz_ptr, gamma_ptr, beta_ptr, bias_ptr, doc_ptr, state_count_ptr, state_doc_ptr, starts_ptr, offsets_ptr,
    quad_q_ptr, quad_k_ptr, lin_q_ptr, lin_k_ptr, weights_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, H2: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr, KEEP_QUAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """z → quad_q, quad_k (N, C, S; only with KEEP_QUAD), lin_q, lin_k (N, C, L) with their weights, weights (N, C, C).

    Blocks of weights above the diagonal stay unwritten, in units of 128. Grid: (C / ROWS, N).
    """
    H: tl.constexpr = S // 2
    TWO: tl.constexpr = DOCS and not CAUSAL
    L: tl.constexpr = 2 * S if TWO else S
    n = tl.program_id(1)
    b, g = n // G, n % G
    dtype = lin_q_ptr.dtype.element_ty
    pair = tl.arange(0, H2)
    present = pair < H
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = g * C + row
    doc = _document(doc_ptr, b, t, T, DOCS)
    read_past, read_future, own, write_past, write_future = _reading(
        doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G, C, G2, CAUSAL, DOCS, HAS_STATE
    )
    z1, z2 = _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E, H)
    a1, a2 = silu(z1), silu(z2)
    cos, sin = _angles(starts_ptr, offsets_ptr, g, row, pair, present, H)
    mask = (row < C)[:, None] & present[None, :]
    place = n.to(tl.int64) * C * S + row[:, None] * S + pair[None, :]
    place_lin = n.to(tl.int64) * C * L + row[:, None] * L + pair[None, :]

    x1, x2 = _head(a1, a2, gamma_ptr, beta_ptr, 3, pair, present, cos, sin, S)
    _store_pair(lin_k_ptr + place_lin, x1 * write_past[:, None], x2 * write_past[:, None], mask, H)
    if TWO:
        _store_pair(lin_k_ptr + place_lin + S, x1 * write_future[:, None], x2 * write_future[:, None], mask, H)
    x1, x2 = _head(a1, a2, gamma_ptr, beta_ptr, 2, pair, present, cos, sin, S)
    _store_pair(lin_q_ptr + place_lin, x1 * read_past[:, None], x2 * read_past[:, None], mask, H)
    if TWO:
        _store_pair(lin_q_ptr + place_lin + S, x1 * read_future[:, None], x2 * read_future[:, None], mask, H)
        own_q1, own_q2 = (x1 * own[:, None]).to(dtype), (x2 * own[:, None]).to(dtype)
    if KEEP_QUAD:
        x1, x2 = _head(a1, a2, gamma_ptr, beta_ptr, 1, pair, present, cos, sin, S)
        _store_pair(quad_k_ptr + place, x1, x2, mask, H)
    q1, q2 = _head(a1, a2, gamma_ptr, beta_ptr, 0, pair, present, cos, sin, S)
    q1, q2 = q1.to(dtype), q2.to(dtype)
    if KEEP_QUAD:
        _store_pair(quad_q_ptr + place, q1, q2, mask, H)

    end = C
    if CAUSAL:
        end = tl.cdiv((tl.program_id(0) + 1) * ROWS, 128) * 128
    for first_key in range(0, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        t_key = g * C + key
        z1, z2 = _load_z(uvz_ptr, b, t_key, T, stride_b, stride_t, pair, present, E, H)
        a1, a2 = silu(z1), silu(z2)
        cos, sin = _angles(starts_ptr, offsets_ptr, g, key, pair, present, H)
        k1, k2 = _head(a1, a2, gamma_ptr, beta_ptr, 1, pair, present, cos, sin, S)
        key_doc = _document(doc_ptr, b, t_key, T, DOCS)
        relu, allowed = _scores(q1, q2, k1.to(dtype), k2.to(dtype), bias_ptr, row, key, doc, key_doc, C, CAUSAL, DOCS)
        weights = relu * relu
        if TWO:
            k1, k2 = _head(a1, a2, gamma_ptr, beta_ptr, 3, pair, present, cos, sin, S)
            linear = dot(own_q1, tl.trans(k1.to(dtype)), tl.zeros([ROWS, KEYS], tl.float32))
            weights += tl.where(allowed, dot(own_q2, tl.trans(k2.to(dtype)), linear), 0.0)
        place_weights = weights_ptr + n.to(tl.int64) * C * C + row[:, None] * C + key[None, :]
        tl.store(place_weights, weights.to(dtype))


@triton.jit
def heads_backward_kernel(  # type: ignore[no-untyped-def]
    uvz_ptr, gamma_ptr, beta_ptr, doc_ptr, state_count_ptr, state_doc_ptr, starts_ptr, offsets_ptr,
    quad_q_ptr, quad_k_ptr, grad_scores_ptr, grad_weights_ptr, grad_lin_q_ptr, grad_lin_k_ptr,
    grad_uvz_ptr, partial_ptr,
    T, G, stride_b, stride_t,
    E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, H2: tl.constexpr, G2: tl.constexpr, CAUSAL: tl.constexpr,
    DOCS: tl.constexpr, HAS_STATE: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Gradients of the rotated heads → gradient of z, and partial sums (programs, 9, S) of gamma's, beta's and z's.

    grad_scores (N, C keys, C queries) is the gradient of q kᵀ/C + bias, transposed; grad_weights likewise that of the
    weights where a query may read (only where own chunks are read linearly). Grid: (C / ROWS, N).
    """
    H: tl.constexpr = S // 2
    TWO: tl.constexpr = DOCS and not CAUSAL
    L: tl.constexpr = 2 * S if TWO else S
    n = tl.program_id(1)
    b, g = n // G, n % G
    dtype = quad_q_ptr.dtype.element_ty
    pair = tl.arange(0, H2)
    present = pair < H
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    t = g * C + row
    read_past, read_future, own, write_past, write_future = _reading(
        doc_ptr, state_count_ptr, state_doc_ptr, b, g, t, T, G, C, G2, CAUSAL, DOCS, HAS_STATE
    )
    cos, sin = _angles(starts_ptr, offsets_ptr, g, row, pair, present, H)
    chunk = n.to(tl.int64) * C
    place_lin = chunk * L + row[:, None] * L + pair[None, :]
    here = present[None, :] & (row < C)[:, None]
    zeros = tl.zeros([ROWS, H2], tl.float32)

    lin_q1, lin_q2 = _load_pair(grad_lin_q_ptr + place_lin, here, H)
    lin_k1, lin_k2 = _load_pair(grad_lin_k_ptr + place_lin, here, H)
    lin_q1, lin_q2 = lin_q1 * read_past[:, None], lin_q2 * read_past[:, None]
    lin_k1, lin_k2 = lin_k1 * write_past[:, None], lin_k2 * write_past[:, None]
    if TWO:
        x1, x2 = _load_pair(grad_lin_q_ptr + place_lin + S, here, H)
        lin_q1, lin_q2 = lin_q1 + x1 * read_future[:, None], lin_q2 + x2 * read_future[:, None]
        x1, x2 = _load_pair(grad_lin_k_ptr + place_lin + S, here, H)
        lin_k1, lin_k2 = lin_k1 + x1 * write_future[:, None], lin_k2 + x2 * write_future[:, None]

    quad_q1, quad_q2 = zeros, zeros
    own_q1, own_q2 = zeros, zeros
    end = C
    if CAUSAL:
        end = first_row + ROWS
    for first in range(0, end, OTHERS):
        key = first + tl.arange(0, OTHERS)
        k1, k2 = _load_pair(
            quad_k_ptr + chunk * S + key[:, None] * S + pair[None, :], present[None, :] & (key < C)[:, None], H
        )
        place = chunk * C + key[:, None] * C + row[None, :]
        grad = tl.trans(tl.load(grad_scores_ptr + place))
        quad_q1, quad_q2 = dot(grad, k1, quad_q1), dot(grad, k2, quad_q2)
        if TWO:
            z1, z2 = _load_z(uvz_ptr, b, g * C + key, T, stride_b, stride_t, pair, present, E, H)
            key_cos, key_sin = _angles(starts_ptr, offsets_ptr, g, key, pair, present, H)
            k1, k2 = _head(silu(z1), silu(z2), gamma_ptr, beta_ptr, 3, pair, present, key_cos, key_sin, S)
            grad = tl.trans(tl.load(grad_weights_ptr + place))
            own_q1, own_q2 = dot(grad, k1.to(dtype), own_q1), dot(grad, k2.to(dtype), own_q2)
    lin_q1, lin_q2 = lin_q1 + own_q1 * own[:, None], lin_q2 + own_q2 * own[:, None]

    quad_k1, quad_k2 = zeros, zeros
    start = 0
    if CAUSAL:
        start = first_row // OTHERS * OTHERS
    for first in range(start, C, OTHERS):
        query = first + tl.arange(0, OTHERS)
        q1, q2 = _load_pair(
            quad_q_ptr + chunk * S + query[:, None] * S + pair[None, :], present[None, :] & (query < C)[:, None], H
        )
        place = chunk * C + row[:, None] * C + query[None, :]
        grad = tl.load(grad_scores_ptr + place)
        quad_k1, quad_k2 = dot(grad, q1, quad_k1), dot(grad, q2, quad_k2)
        if TWO:
            t_query = g * C + query
            z1, z2 = _load_z(uvz_ptr, b, t_query, T, stride_b, stride_t, pair, present, E, H)
            query_cos, query_sin = _angles(starts_ptr, offsets_ptr, g, query, pair, present, H)
            q1, q2 = _head(silu(z1), silu(z2), gamma_ptr, beta_ptr, 2, pair, present, query_cos, query_sin, S)
            _, _, query_own, _, _ = _reading(
                doc_ptr, state_count_ptr, state_doc_ptr, b, g, t_query, T, G, C, G2, CAUSAL, DOCS, HAS_STATE
            )
            grad = tl.load(grad_weights_ptr + place)
            lin_k1 = dot(grad, (q1 * query_own[:, None]).to(dtype), lin_k1)
            lin_k2 = dot(grad, (q2 * query_own[:, None]).to(dtype), lin_k2)

    z1, z2 = _load_z(uvz_ptr, b, t, T, stride_b, stride_t, pair, present, E, H)
    a1, a2 = silu(z1), silu(z2)
    grad_a1, grad_a2 = zeros, zeros
    partial = partial_ptr + (n.to(tl.int64) * (C // ROWS) + tl.program_id(0)) * 9 * S + pair
    for head in tl.static_range(4):
        if head == 0:
            x1, x2 = quad_q1 / C, quad_q2 / C
        elif head == 1:
            x1, x2 = quad_k1 / C, quad_k2 / C
        elif head == 2:
            x1, x2 = lin_q1, lin_q2
        else:
            x1, x2 = lin_k1, lin_k2
        x1, x2 = rotate(x1, x2, cos, -sin)
        gamma1 = tl.load(gamma_ptr + head * S + pair, mask=present, other=0.0).to(tl.float32)
        gamma2 = tl.load(gamma_ptr + head * S + H + pair, mask=present, other=0.0).to(tl.float32)
        grad_a1 += x1 * gamma1[None, :]
        grad_a2 += x2 * gamma2[None, :]
        tl.store(partial + head * S, tl.sum(x1 * a1, 0), mask=present)
        tl.store(partial + head * S + H, tl.sum(x2 * a2, 0), mask=present)
        tl.store(partial + (4 + head) * S, tl.sum(x1, 0), mask=present)
        tl.store(partial + (4 + head) * S + H, tl.sum(x2, 0), mask=present)
    grad_z1, grad_z2 = grad_a1 * silu_derivative(z1), grad_a2 * silu_derivative(z2)
    tl.store(partial + 8 * S, tl.sum(grad_z1, 0), mask=present)
    tl.store(partial + 8 * S + H, tl.sum(grad_z2, 0), mask=present)
    grad_z = (b.to(tl.int64) * T + t.to(tl.int64))[:, None] * (2 * E + S) + 2 * E + pair[None, :]
    _store_pair(grad_uvz_ptr + grad_z, grad_z1, grad_z2, (t < T)[:, None] & present[None, :], H)


@triton.jit
def diagonals_kernel(square_ptr, sums_ptr, C: tl.constexpr, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the diagonals of (C keys, C queries): element key − query + C − 1. Grid: (2C − 1,)."""
    offset = tl.program_id(0) - (C - 1)
    query = tl.arange(0, C)
    key = query + offset
    mask = (key >= 0) & (key < C)
    if CAUSAL:
        mask = mask & (key <= query)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.load(square_ptr + key * C + query, mask=mask, other=0.0), 0))
