"""The ops against the paper's formulas, evaluated token by token in Python's floats, without a line of shared code."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_model.ops import AttentionState, combine, mixed_chunk_attention, quadratic_attention

C, S, E = 4, 4, 6
TOLERANCE = 1e-12

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def rope(x: list[float], position: int, base: float) -> list[float]:
    half = len(x) // 2
    out = [0.0] * len(x)
    for k in range(half):
        angle = position * base ** (-k / half)
        out[k] = x[k] * math.cos(angle) - x[k + half] * math.sin(angle)
        out[k + half] = x[k] * math.sin(angle) + x[k + half] * math.cos(angle)
    return out


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def direct_heads(inputs: Inputs, b: int, t: int, position: int, base: float) -> list[list[float]]:
    uvz, gamma, beta, _ = (x.tolist() for x in inputs)
    z = [silu(x) for x in uvz[b][t][2 * E :]]
    return [
        rope([x * g + o for x, g, o in zip(z, gamma_h, beta_h, strict=True)], position, base)
        for gamma_h, beta_h in zip(gamma, beta, strict=True)
    ]


def direct(
    inputs: Inputs,
    *,
    causal: bool,
    documents: list[list[int]] | None = None,
    start: int = 0,
    base: float = 10000.0,
) -> Tensor:
    """Mixed chunk attention of section 2 of the paper with exact documents: every token asks every other one."""
    uvz, _, _, bias = (x.tolist() for x in inputs)
    rows = []
    for b, sequence in enumerate(uvz):
        T = len(sequence)
        doc = documents[b] if documents else [0] * T
        heads = [direct_heads(inputs, b, t, start + t, base) for t in range(T)]
        u = [[silu(x) for x in token[:E]] for token in sequence]
        v = [[silu(x) for x in token[E : 2 * E]] for token in sequence]
        for i in range(T):
            attended = [0.0] * E
            by_chunk: dict[int, list[float]] = {}
            for j in range(T):
                if doc[j] != doc[i]:
                    continue
                same_chunk = i // C == j // C
                if same_chunk and (j <= i or not causal):
                    score = dot(heads[i][0], heads[j][1]) / C + bias[j - i + C - 1]
                    weight = max(score, 0.0) ** 2
                    attended = [a + weight * x for a, x in zip(attended, v[j], strict=True)]
                if (j // C < i // C) or not causal:
                    linear = dot(heads[i][2], heads[j][3]) / C
                    so_far = by_chunk.setdefault(j // C, [0.0] * E)
                    by_chunk[j // C] = [a + linear * x for a, x in zip(so_far, v[j], strict=True)]
            for chunk_reading in by_chunk.values():
                attended = [a + x / len(by_chunk) for a, x in zip(attended, chunk_reading, strict=True)]
            rows.append([g * a for g, a in zip(u[i], attended, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(len(uvz), -1, E)


def direct_quadratic(
    inputs: Inputs, n: int, *, causal: bool, documents: list[list[int]] | None = None, start: int = 0
) -> Tensor:
    """FLASH-Quad of section 1 of the paper."""
    uvz, _, _, bias = (x.tolist() for x in inputs)
    L = (len(bias) + 1) // 2
    rows = []
    for b, sequence in enumerate(uvz):
        T = len(sequence)
        heads = [direct_heads(inputs, b, t, start + t, 10000.0) for t in range(T)]
        for i in range(T):
            attended = [0.0] * E
            for j in range(i + 1 if causal else T):
                if documents is None or documents[b][i] == documents[b][j]:
                    weight = max(dot(heads[i][0], heads[j][1]) / n + bias[j - i + L - 1], 0.0) ** 2
                    attended = [a + weight * silu(x) for a, x in zip(attended, sequence[j][E : 2 * E], strict=True)]
            rows.append([silu(x) * a for x, a in zip(sequence[i][:E], attended, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(len(uvz), -1, E)


def random_inputs(
    T: int, *, B: int = 2, heads: int = 4, extent: int = C, seed: int = 0, bias_mean: float = 0.0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return normal(B, T, 2 * E + S), normal(heads, S), normal(heads, S), normal(2 * extent - 1) + bias_mean


def random_documents(T: int, seed: int, ends: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = (torch.rand(2, T, generator=generator) < ends).long() * torch.randint(1, 4, (2, T), generator=generator)
    return steps.cumsum(1) + 3


def lengths(*lengths: int) -> list[int]:
    """Document ids of documents of these lengths."""
    return [doc for doc, length in enumerate(lengths) for _ in range(length)]


TRICKY = {
    "one document over all chunks": lengths(19),
    "a new document in each chunk's middle": lengths(2, 4, 4, 4, 5),
    "borders at chunk borders": lengths(4, 8, 4, 3),
    "many inside one chunk": lengths(1, 1, 1, 1, 1, 2, 12),
    "ends one token into a chunk": lengths(9, 10),
    "starts at the last token of a chunk": lengths(7, 12),
    "all of length one": lengths(*[1] * 19),
    "long, then inside, then long": lengths(6, 1, 12),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, C - 1, C, C + 1, 2 * C, 3 * C + 7])
def test_equals_the_formulas(T: int, causal: bool) -> None:
    inputs = random_inputs(T)
    out = mixed_chunk_attention(*inputs, chunk_size=C, causal=causal, start=3 * C)
    torch.testing.assert_close(out, direct(inputs, causal=causal, start=3 * C), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", TRICKY)
def test_equals_the_formulas_in_tricky_documents(name: str, causal: bool) -> None:
    documents = [TRICKY[name], lengths(3, 16)]
    inputs = random_inputs(19, seed=1)
    out = mixed_chunk_attention(*inputs, chunk_size=C, causal=causal, doc_ids=torch.tensor(documents))
    torch.testing.assert_close(out, direct(inputs, causal=causal, documents=documents), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_formulas_in_random_documents(seed: int, causal: bool) -> None:
    T, ends = 1 + (seed * 7) % 25, (0.1, 0.3, 0.6)[seed % 3]
    inputs, documents = random_inputs(T, seed=seed), random_documents(T, seed, ends)
    out = mixed_chunk_attention(*inputs, chunk_size=C, causal=causal, doc_ids=documents.int(), rope_base=100.0)
    expected = direct(inputs, causal=causal, documents=documents.tolist(), base=100.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, [TRICKY["many inside one chunk"], lengths(7, 12)]])
def test_quadratic_equals_the_formulas(documents: list[list[int]] | None, causal: bool) -> None:
    inputs = random_inputs(19, heads=2, extent=23)
    doc_ids = None if documents is None else torch.tensor(documents)
    out = quadratic_attention(*inputs, norm_length=9, causal=causal, doc_ids=doc_ids, start=5)
    expected = direct_quadratic(inputs, 9, causal=causal, documents=documents, start=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_quadratic_in_several_blocks_of_queries(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_model.ops import reference_quadratic

    inputs, documents = random_inputs(19, heads=2, extent=23), torch.tensor([lengths(2, 9, 8), lengths(19)])
    options: dict[str, Any] = {"norm_length": 19, "causal": causal, "doc_ids": documents}
    expected, expected_grads = _with_grads(quadratic_attention, inputs, options)
    monkeypatch.setattr(reference_quadratic, "BLOCK", 5)
    out, grads = _with_grads(quadratic_attention, inputs, options)
    torch.testing.assert_close([out, *grads], [expected, *expected_grads], rtol=0, atol=TOLERANCE)


def _with_grads(op: Any, inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves, **options)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("with_documents", [False, True])
def test_causal_flash_of_one_chunk_is_flash_quad(with_documents: bool) -> None:
    T = 8
    uvz, gamma, beta, bias = random_inputs(T, extent=T)
    doc_ids = random_documents(T, 0, 0.4) if with_documents else None
    flash = mixed_chunk_attention(uvz, gamma, beta, bias, chunk_size=T, doc_ids=doc_ids)
    quad = quadratic_attention(uvz, gamma[:2], beta[:2], bias, norm_length=T, doc_ids=doc_ids)
    torch.testing.assert_close(flash, quad, rtol=0, atol=TOLERANCE)


def test_bidirectional_flash_of_one_chunk_is_flash_quad_and_the_linear_term() -> None:
    T = 8
    uvz, gamma, beta, bias = random_inputs(T, extent=T)
    flash = mixed_chunk_attention(uvz, gamma, beta, bias, chunk_size=T, causal=False)
    quad = quadratic_attention(uvz, gamma[:2], beta[:2], bias, norm_length=T, causal=False)
    inputs = uvz, gamma, beta, bias
    heads = torch.tensor(
        [[direct_heads(inputs, b, t, t, 1e4) for t in range(T)] for b in range(2)], dtype=torch.float64
    )
    lin_q, lin_k = heads[:, :, 2], heads[:, :, 3]
    u, v, _ = torch.nn.functional.silu(uvz).split([E, E, S], -1)
    linear = u * (lin_q @ (lin_k.mT @ v / T))
    torch.testing.assert_close(flash, quad + linear, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("cuts", [(4,), (8,), (4, 8, 12, 16), (12, 16)])
def test_a_cut_sequence_equals_the_uncut_one(cuts: tuple[int, ...], with_documents: bool) -> None:
    T = 19
    inputs = random_inputs(T, seed=3)
    doc_ids = torch.tensor([lengths(2, 9, 8), lengths(19)]) if with_documents else None

    def pieces(uvz: Tensor, *rest: Tensor) -> Tensor:
        outs, state = [], None
        borders = [0, *cuts, T]
        for first, end in pairwise(borders):
            piece_ids = None if doc_ids is None else doc_ids[:, first:end]
            options: dict[str, Any] = {"chunk_size": C, "doc_ids": piece_ids, "start": first, "state": state}
            if end < T:
                out, state = mixed_chunk_attention(uvz[:, first:end], *rest, return_state=True, **options)
            else:
                out = mixed_chunk_attention(uvz[:, first:end], *rest, **options)
            outs.append(out)
        return torch.cat(outs, 1)

    expected = _with_grads(mixed_chunk_attention, inputs, {"chunk_size": C, "doc_ids": doc_ids})
    found = _with_grads(pieces, inputs, {})
    torch.testing.assert_close([found[0], *found[1]], [expected[0], *expected[1]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(8))
def test_states_of_pieces_combine_to_the_state_of_the_whole(seed: int) -> None:
    T, cuts = 20, (8, 12)
    inputs = random_inputs(T, seed=seed)
    doc_ids = torch.stack([random_documents(T, seed, 0.1)[0], random_documents(T, seed, 0.02)[1]])

    def state_of(first: int, end: int) -> AttentionState:
        return mixed_chunk_attention(
            inputs[0][:, first:end], *inputs[1:],
            chunk_size=C, doc_ids=doc_ids[:, first:end], start=first, return_state=True,
        )[1]  # fmt: skip

    a, b, c = state_of(0, cuts[0]), state_of(cuts[0], cuts[1]), state_of(cuts[1], T)
    whole = state_of(0, T)
    torch.testing.assert_close(tuple(combine(combine(a, b), c)), tuple(whole), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tuple(combine(a, combine(b, c))), tuple(whole), rtol=0, atol=TOLERANCE)

    nothing = AttentionState(torch.zeros_like(a.sum), torch.zeros_like(a.count), a.doc_id + 7, ~a.single)  # type: ignore[operator]
    for found in (combine(nothing, a), combine(a, nothing)):
        torch.testing.assert_close(tuple(found), tuple(a), rtol=0, atol=0)


def test_a_piece_of_several_documents_drops_what_came_before_whatever_their_numbers() -> None:
    _, a = mixed_chunk_attention(*random_inputs(C), chunk_size=C, return_state=True)
    _, b = mixed_chunk_attention(*random_inputs(C, seed=1), chunk_size=C, return_state=True)
    several = b._replace(single=torch.tensor([False, True]))
    found = combine(a, several)
    assert torch.equal(found.sum[0], b.sum[0])
    assert torch.equal(found.sum[1], a.sum[1] + b.sum[1])
    assert found.count.tolist() == [1, 2]
    assert found.single is not None
    assert found.single.tolist() == [False, True]


def test_combine_asks_whether_a_piece_is_one_document() -> None:
    _, state = mixed_chunk_attention(*random_inputs(C), chunk_size=C, return_state=True)
    with pytest.raises(ValueError, match="single"):
        combine(state, state._replace(single=None))


def test_the_state_is_a_sum_over_chunks_of_the_last_document() -> None:
    inputs = random_inputs(12, B=1)
    doc_ids = torch.tensor([lengths(3, 9)])
    _, state = mixed_chunk_attention(*inputs, chunk_size=C, doc_ids=doc_ids, return_state=True)
    expected = torch.zeros(S, E, dtype=torch.float64)
    for t in range(3, 12):
        key = direct_heads(inputs, 0, t, t, 1e4)[3]
        for s in range(S):
            for e in range(E):
                expected[s, e] += key[s] * silu(inputs[0][0, t, E + e].item()) / C
    torch.testing.assert_close(state.sum[0], expected, rtol=0, atol=TOLERANCE)
    assert state.count.tolist() == [3]
    assert state.doc_id.tolist() == [1]
    assert state.single is not None
    assert state.single.tolist() == [False]


def test_a_token_of_another_document_ignores_the_state() -> None:
    inputs = random_inputs(6)
    doc_ids = torch.tensor([lengths(6), [4] * 6])
    state = AttentionState(torch.ones(2, S, E, dtype=torch.float64), torch.tensor([2, 2]), torch.tensor([0, 3]))
    with_state = mixed_chunk_attention(*inputs, chunk_size=C, doc_ids=doc_ids, start=8, state=state)
    without = mixed_chunk_attention(*inputs, chunk_size=C, doc_ids=doc_ids, start=8)
    assert torch.equal(with_state[1], without[1])
    assert not torch.isclose(with_state[0], without[0]).any()


def test_changing_a_token_changes_nothing_before_it() -> None:
    T = 19
    quad = random_inputs(T, heads=2, extent=T, bias_mean=6.0)
    cases: list[tuple[Any, Inputs, dict[str, Any]]] = [
        (mixed_chunk_attention, random_inputs(T, bias_mean=6.0), {"chunk_size": C}),
        (quadratic_attention, quad, {"norm_length": T}),
    ]
    for op, inputs, options in cases:
        before = op(*inputs, **options)
        for t in range(T):
            changed = inputs[0].clone()
            changed[:, t] += 1.0
            after = op(changed, *inputs[1:], **options)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("causal", [True, False])
def test_changing_a_document_changes_no_other(causal: bool) -> None:
    T = 19
    documents = torch.tensor([lengths(2, 9, 8)])
    quad = random_inputs(T, B=1, heads=2, extent=T, bias_mean=6.0)
    cases: list[tuple[Any, Inputs, dict[str, Any]]] = [
        (mixed_chunk_attention, random_inputs(T, B=1, bias_mean=6.0), {"chunk_size": C}),
        (quadratic_attention, quad, {"norm_length": T}),
    ]
    for op, inputs, options in cases:
        before = op(*inputs, doc_ids=documents, causal=causal, **options)
        for document in range(3):
            inside = (documents == document)[0]
            changed = inputs[0].clone()
            changed[:, inside] += 1.0
            after = op(changed, *inputs[1:], doc_ids=documents, causal=causal, **options)
            torch.testing.assert_close(after[:, ~inside], before[:, ~inside], rtol=0, atol=TOLERANCE)
            assert not torch.isclose(after[:, inside], before[:, inside]).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients(causal: bool, with_documents: bool) -> None:
    T = 11
    doc_ids = torch.tensor([lengths(2, 6, 3), lengths(5, 6)]) if with_documents else None
    flash = [x.requires_grad_() for x in random_inputs(T)]
    assert torch.autograd.gradcheck(
        lambda *x: mixed_chunk_attention(*x, chunk_size=C, causal=causal, doc_ids=doc_ids), flash
    )
    quad = [x.requires_grad_() for x in random_inputs(T, heads=2, extent=T + 2)]
    assert torch.autograd.gradcheck(
        lambda *x: quadratic_attention(*x, norm_length=7, causal=causal, doc_ids=doc_ids), quad
    )


@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_through_the_state(with_documents: bool) -> None:
    T = 8
    inputs = [x.requires_grad_() for x in random_inputs(T)]
    entering = torch.randn(2, S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    doc_ids = torch.tensor([lengths(6, 2), lengths(8)]) if with_documents else None

    def run(entering: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        state = AttentionState(entering, torch.tensor([3, 3]), torch.tensor([0, 0]))
        out, left = mixed_chunk_attention(
            *inputs, chunk_size=C, doc_ids=doc_ids, start=12, state=state, return_state=True
        )
        return out, left.sum

    assert torch.autograd.gradcheck(run, (entering, *inputs))
    assert torch.autograd.gradcheck(lambda *x: run(*x)[1], (entering, *inputs))
