"""Kernels of FLASH-Quad's attention. The loops over products know no masks: their operands are padded with zeros.

Shape letters: P padded length of a sequence, S query/key, E values; R, K rows and keys of a strip of scores. A row is
a query. Sequences of a batch lie one behind the other, so (B, P, E) is addressed as (B·P, E); tiles never cross them.
"""

# Kernels are Triton's, not Python's, to check.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable
# mypy: disable-error-code="assignment,misc"

import triton
import triton.language as tl

from flash_model.ops.triton_math import (
    dot,
    gate_backward,
    gated,
    rotated_head,
    rotated_head_backward,
    silu,
    silu_derivative,
)

GRAIN: tl.constexpr = tl.constexpr(256)


@triton.jit
def _masked(first_row, first_key, CAUSAL: tl.constexpr):
    """Whether a tile is left unwritten because no tile of rows, of at most GRAIN, reads its keys."""
    return CAUSAL and first_key // GRAIN > first_row // GRAIN


@triton.jit
def prepare_kernel(
    uvz_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, heads_ptr, values_ptr, T, P, head_stride,
    E: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """uvz (B, T, 2E + S) → q and k, rotated (2, B·P, S), and SiLU(v) (B·P, E). Grid: (B·P / ROWS, 1 + E / COLUMNS)."""
    H: tl.constexpr = S // 2
    first = tl.program_id(0) * ROWS
    b = first // P
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    t = first - b * P + tl.arange(0, ROWS)
    there = (t < T)[:, None]
    source = uvz_ptr + (b.to(tl.int64) * T + t)[:, None] * (2 * E + S)
    if tl.program_id(1) > 0:
        column = (tl.program_id(1) - 1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        v = tl.load(source + E + column, mask=there, other=0.0)
        tl.store(values_ptr + row[:, None] * E + column, silu(v).to(values_ptr.dtype.element_ty))
    else:
        pair = tl.arange(0, PAIRS)
        present = (pair < H)[None, :]
        mask = there & present
        a1 = silu(tl.load(source + 2 * E + pair[None, :], mask=mask, other=0.0))
        a2 = silu(tl.load(source + 2 * E + H + pair[None, :], mask=mask, other=0.0))
        angle = t[:, None] * H + pair[None, :]
        cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
        for head in tl.static_range(2):
            x1, x2 = rotated_head(a1, a2, gamma_ptr, beta_ptr, head, pair, pair < H, cos, sin, S)
            target = heads_ptr + head * head_stride + row[:, None] * S + pair[None, :]
            tl.store(target, tl.where(there, x1, 0.0).to(heads_ptr.dtype.element_ty), mask=present)
            tl.store(target + H, tl.where(there, x2, 0.0).to(heads_ptr.dtype.element_ty), mask=present)


@triton.jit
def scores_kernel(
    q_desc, k_desc, bias_ptr, doc_ptr, weights_ptr, B, T, P, row0, key0, strip_rows, strip_keys, scale,
    S: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """relu(q kᵀ · scale + bias)², 0 where a row may not read: a strip (B·R, K).

    bias is (2P,), element key − row + P. Grid: (R / ROWS, K / COLUMNS, any): the third takes turns over sequences.
    """
    first_row = row0 + tl.program_id(0) * ROWS
    first_key = key0 + tl.program_id(1) * COLUMNS
    if _masked(first_row, first_key, CAUSAL):
        return
    row, key = first_row + tl.arange(0, ROWS), first_key + tl.arange(0, COLUMNS)
    allowed = (row < T)[:, None] & (key < T)[None, :]
    if CAUSAL:
        allowed = allowed & (key[None, :] <= row[:, None])
    bias = tl.where(allowed, tl.load(bias_ptr + (P + key[None, :] - row[:, None])), float("-inf"))
    for b in range(tl.program_id(2), B, tl.num_programs(2)):
        scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        for s in tl.static_range(0, S, DEPTH):
            q, k = q_desc.load([b * P + first_row, s]), k_desc.load([b * P + first_key, s])
            scores = dot(q, k.T, scores)
        relu = tl.maximum(scores * scale + bias, 0.0)
        if DOCS:
            docs = doc_ptr + tl.cast(b, tl.int64) * T
            row_doc, key_doc = tl.load(docs + row, mask=row < T, other=0), tl.load(docs + key, mask=key < T, other=0)
            relu = tl.where(row_doc[:, None] == key_doc[None, :], relu, 0.0)
        weights = (relu * relu).to(weights_ptr.dtype.element_ty)
        strip = weights_ptr + (b * strip_rows + first_row - row0).to(tl.int64) * strip_keys + (first_key - key0)
        place = tl.arange(0, ROWS)[:, None] * strip_keys + tl.arange(0, COLUMNS)[None, :]
        tl.store(strip + place, weights)


@triton.jit
def attend_kernel(
    weights_desc, values_desc, uvz_ptr, out_ptr, T, P, row0, strip_rows, tiles,
    E: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """SiLU(u) · (weights · values) of a strip of rows → out (B, T, E). Grid: (B · tiles of rows · E / COLUMNS,).

    Neighbours share their rows; a sequence's longest rows come first.
    """
    program = tl.program_id(0)
    first_column = program % (E // COLUMNS) * COLUMNS
    program = program // (E // COLUMNS)
    b = program // tiles
    local = (tiles - 1 - program % tiles) * ROWS
    first_row = row0 + local
    end = P
    if CAUSAL:
        end = tl.minimum(first_row + ROWS, P)
    attended = tl.zeros([ROWS, COLUMNS], tl.float32)
    for key in range(0, end, DEPTH):
        weights = weights_desc.load([b * strip_rows + local, key])
        attended = dot(weights, values_desc.load([b * P + key, first_column]), attended)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    mask = (row < T)[:, None]
    token = (b.to(tl.int64) * T + row)[:, None]
    u = tl.load(uvz_ptr + token * (2 * E + S) + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + token * E + column[None, :], gated(u, attended).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad_out_ptr, out_ptr, uvz_ptr, grad_uvz_ptr, grad_attended_ptr, T, P,
    E: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of u, and that of what was attended (B·P, E), 0 in the padding. Grid: (B·P / ROWS, E / COLUMNS)."""
    first = tl.program_id(0) * ROWS
    b = first // P
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    t = first - b * P + tl.arange(0, ROWS)
    mask = (t < T)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = (b.to(tl.int64) * T + t)[:, None]
    grad_out = tl.load(grad_out_ptr + token * E + column, mask=mask, other=0.0)
    out = tl.load(out_ptr + token * E + column, mask=mask, other=0.0)
    u = tl.load(uvz_ptr + token * (2 * E + S) + column, mask=mask, other=0.0)
    grad_u = gate_backward(u, out, grad_out)
    tl.store(grad_uvz_ptr + token * (2 * E + S) + column, grad_u.to(grad_uvz_ptr.dtype.element_ty), mask=mask)
    grad_attended = gated(u, grad_out).to(grad_attended_ptr.dtype.element_ty)
    tl.store(grad_attended_ptr + row[:, None] * E + column, grad_attended)


@triton.jit
def score_grads_kernel(
    grad_attended_desc, values_desc, weights_ptr, grad_scores_ptr, P, row0, key0, strip_rows, strip_keys,
    row_tiles, key_tiles,
    E: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of q kᵀ · scale + bias for a strip of keys, like its weights (B·R, K).

    Grid: (B · tiles of rows · tiles of keys,); neighbours share their rows.
    """
    program = tl.program_id(0)
    local_key = program % key_tiles * COLUMNS
    program = program // key_tiles
    b = program // row_tiles
    local_row = program % row_tiles * ROWS
    first_row, first_key = row0 + local_row, key0 + local_key
    if _masked(first_row, first_key, CAUSAL):
        return
    grad_weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    for e in range(0, E, DEPTH):
        grad_attended = grad_attended_desc.load([b * P + first_row, e])
        grad_weights = dot(grad_attended, values_desc.load([b * P + first_key, e]).T, grad_weights)
    place = (b.to(tl.int64) * strip_rows + local_row + tl.arange(0, ROWS))[:, None] * strip_keys
    place += (local_key + tl.arange(0, COLUMNS))[None, :]
    relu = tl.sqrt(tl.load(weights_ptr + place).to(tl.float32))
    tl.store(grad_scores_ptr + place, (2.0 * grad_weights * relu).to(grad_scores_ptr.dtype.element_ty))


@triton.jit
def _columns_product(
    square_desc, right_desc, square_row, right_row, local_key, column, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """squareᵀ · right over `rows` rows: (ROWS keys of a strip, COLUMNS)."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(0, rows, DEPTH):
        square = square_desc.load([square_row + row, local_key])
        product = dot(square.T, right_desc.load([right_row + row, column]), product)
    return product


@triton.jit
def key_grads_kernel(
    weights_desc, grad_scores_desc, grad_attended_desc, q_desc, uvz_ptr, grad_uvz_ptr, grad_k_ptr, T, P, row0, key0,
    strip_rows, tiles, scale,
    E: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradients of v, into grad_uvz, and of k (B·P, S) for a strip of keys.

    Grid: (B · tiles of keys · (E / COLUMNS + S / HEAD_COLUMNS),); neighbours share their keys, and the keys that most
    rows read come first.
    """
    E_TILES: tl.constexpr = E // COLUMNS
    TILES: tl.constexpr = E_TILES + S // HEAD_COLUMNS
    program = tl.program_id(0)
    tile = program % TILES
    program = program // TILES
    b = program // tiles
    local_key = program % tiles * ROWS
    first_key = key0 + local_key
    first_row = row0
    if CAUSAL:
        first_row = first_key
    square_row, right_row = b * strip_rows + first_row - row0, b * P + first_row
    key = first_key + tl.arange(0, ROWS)
    if tile < E_TILES:
        first_column = tile * COLUMNS
        grad_v = _columns_product(
            weights_desc, grad_attended_desc, square_row, right_row, local_key, first_column, P - first_row,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        mask = (key < T)[:, None]
        at_v = (b.to(tl.int64) * T + key)[:, None] * (2 * E + S) + E + first_column + tl.arange(0, COLUMNS)[None, :]
        grad_v *= silu_derivative(tl.load(uvz_ptr + at_v, mask=mask, other=0.0))
        tl.store(grad_uvz_ptr + at_v, grad_v.to(grad_uvz_ptr.dtype.element_ty), mask=mask)
    else:
        first_column = (tile - E_TILES) * HEAD_COLUMNS
        grad_k = _columns_product(
            grad_scores_desc, q_desc, square_row, right_row, local_key, first_column, P - first_row,
            ROWS, HEAD_COLUMNS, DEPTH,
        )  # fmt: skip
        at_k = (b.to(tl.int64) * P + key)[:, None] * S + first_column + tl.arange(0, HEAD_COLUMNS)[None, :]
        tl.store(grad_k_ptr + at_k, grad_k * scale)


@triton.jit
def query_grads_kernel(
    grad_scores_desc, k_desc, grad_q_ptr, P, row0, key0, strip_rows, keys, scale, FIRST: tl.constexpr,
    S: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add what a strip of `keys` keys gives to the gradient of q (B·P, S). Grid: (R / ROWS, S / COLUMNS, B)."""
    b = tl.program_id(2)
    local_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    first_row = row0 + local_row
    end = keys
    if CAUSAL:
        end = tl.minimum(first_row + ROWS - key0, keys)
    grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    for key in range(0, end, DEPTH):
        grad_scores = grad_scores_desc.load([b * strip_rows + local_row, key])
        grad = dot(grad_scores, k_desc.load([b * P + key0 + key, first_column]), grad)
    place = grad_q_ptr + (b.to(tl.int64) * P + first_row + tl.arange(0, ROWS))[:, None] * S
    place += (first_column + tl.arange(0, COLUMNS))[None, :]
    grad *= scale
    if not FIRST:
        grad += tl.load(place)
    tl.store(place, grad)


@triton.jit
def diagonals_kernel(
    grad_scores_ptr, sums_ptr, P, row0, key0, strip_rows, strip_keys, keys, lowest,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the diagonals key − row = lowest … of a strip: sums (B, 2P), element key − row + P.

    Grid: (diagonals / COLUMNS, B).
    """
    b = tl.program_id(1)
    first = lowest + tl.program_id(0) * COLUMNS
    diagonal = first + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    begin = tl.maximum(key0 - first - COLUMNS + 1, row0)
    end = tl.minimum(key0 + keys - first, P)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        local_key = row + diagonal[None, :] - key0
        mask = (row < P) & (local_key >= 0) & (local_key < keys)
        if CAUSAL:
            mask = mask & (diagonal <= 0)[None, :]
        place = (b.to(tl.int64) * strip_rows + row - row0) * strip_keys + local_key
        total += tl.sum(tl.load(grad_scores_ptr + place, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(sums_ptr + b * 2 * P + P + diagonal, total, mask=diagonal < P)


@triton.jit
def heads_backward_kernel(
    grad_heads_ptr, uvz_ptr, gamma_ptr, cos_ptr, sin_ptr, grad_uvz_ptr, partial_ptr, T, P, head_stride,
    E: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of rotated q and k (2, B·P, S) → that of z, and partial sums (programs, 4, S) of gamma's and beta's.

    Grid: (B·P / ROWS,).
    """
    H: tl.constexpr = S // 2
    first = tl.program_id(0) * ROWS
    b = first // P
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    t = first - b * P + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    present = pair < H
    mask = (t < T)[:, None] & present[None, :]
    place = (b.to(tl.int64) * T + t)[:, None] * (2 * E + S) + 2 * E + pair[None, :]
    z1, z2 = tl.load(uvz_ptr + place, mask=mask, other=0.0), tl.load(uvz_ptr + place + H, mask=mask, other=0.0)
    a1, a2 = silu(z1), silu(z2)
    angle = t[:, None] * H + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
    grad1, grad2 = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 4 * S + pair
    for head in tl.static_range(2):
        source = grad_heads_ptr + head * head_stride + row[:, None] * S + pair[None, :]
        x1, x2 = tl.load(source, mask=mask, other=0.0), tl.load(source + H, mask=mask, other=0.0)
        x1, x2 = rotated_head_backward(x1, x2, a1, a2, cos, sin, gamma_ptr, partial, pair, present, head, 2, S)
        grad1 += x1
        grad2 += x2
    dtype = grad_uvz_ptr.dtype.element_ty
    tl.store(grad_uvz_ptr + place, (grad1 * silu_derivative(z1)).to(dtype), mask=mask)
    tl.store(grad_uvz_ptr + place + H, (grad2 * silu_derivative(z2)).to(dtype), mask=mask)
