"""What accuracy tests of both ops share: cases, random inputs on which every branch matters, outputs and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_model.ops import AttentionState, dispatch, mixed_chunk_attention, quadratic_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the tests can still be tried out, on the reference."""


@dataclass(frozen=True)
class Case:
    """The shape of a problem. `chunk` is None for FLASH-Quad; with `state` one enters, and leaves where T allows it."""

    S: int
    E: int
    T: int
    B: int = 1
    chunk: int | None = 256
    causal: bool = True
    documents: bool = False
    state: bool = False
    wide_parameters: bool = False
    """gamma, beta and bias are float32 beside a bfloat16 uvz."""

    def __str__(self) -> str:
        marks = [name for name in ("documents", "state", "wide_parameters") if getattr(self, name)]
        direction = "causal" if self.causal else "bidirectional"
        return "-".join([f"C{self.chunk or ''}S{self.S}E{self.E}T{self.T}B{self.B}", direction, *marks])

    @property
    def start(self) -> int:
        """Position of the first token."""
        return 3 * (self.chunk or 11) if self.state else 0

    @property
    def returns_state(self) -> bool:
        """A state leaves."""
        return self.chunk is not None and self.state and self.T % self.chunk == 0


@dataclass(frozen=True)
class Problem:
    """A case with numbers: tensors by argument's name, other options, and the gradients that come back."""

    case: Case
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    state: AttentionState | None
    grad_out: Tensor
    grad_left: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem with every floating tensor in `dtype`."""
        state = None if self.state is None else self.state._replace(sum=self.state.sum.to(dtype))
        tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        return Problem(
            self.case, tensors, self.options, state, self.grad_out.to(dtype), self.grad_left.to(dtype)
        )  # fmt: skip


def draw_documents(case: Case, generator: torch.Generator) -> Tensor:
    """Documents from one token to five chunks long, other ones in each sequence."""
    unit = case.chunk or 128
    lengths = torch.tensor([1, 2, unit // 3, unit - 1, unit, 2 * unit + 5, 5 * unit])
    rows = []
    for _ in range(case.B):
        drawn = lengths[torch.randint(len(lengths), (case.T,), generator=generator)]
        steps = torch.randint(1, 4, (case.T,), generator=generator)
        rows.append(torch.repeat_interleave(steps.cumsum(0), drawn)[: case.T])
    return torch.stack(rows).to(DEVICE)


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw a problem: uvz is N(0, 1); gamma and beta so large that scores are as large as the bias, about ±0.5."""
    host, device = torch.Generator().manual_seed(seed), torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, generator=device, device=DEVICE).to(like)

    B, T, S, E = case.B, case.T, case.S, case.E
    heads, norm, extent = (2, T + 5, T + 37) if case.chunk is None else (4, case.chunk, case.chunk)
    scale = (norm / S**0.5) ** 0.5
    tensors = {
        "uvz": normal(B, T, 2 * E + S),
        "gamma": scale * normal(heads, S),
        "beta": 0.5 * scale * normal(heads, S),
        "bias": 0.25 + 0.5 * normal(2 * extent - 1),
    }
    if case.wide_parameters:  # of bfloat16's precision, so that plain torch loses nothing by rounding them
        tensors |= {name: tensors[name].to(dtype).float() for name in ("gamma", "beta", "bias")}
    documents = draw_documents(case, host) if case.documents else None
    options: dict[str, Any] = {"causal": case.causal, "doc_ids": documents, "start": case.start}
    options |= {"norm_length": norm} if case.chunk is None else {"chunk_size": case.chunk}
    state = None
    if case.state and case.chunk is not None:
        arriving = torch.zeros(B, dtype=torch.int64, device=DEVICE) if documents is None else documents[:, 0].clone()
        arriving[B - 2 : B - 1] -= 1  # the last sequence but one begins another document
        # Columns of one tensor: who keeps states in a table hands over such views.
        table = torch.stack([torch.arange(1, B + 1, device=DEVICE), arriving], 1)
        state = AttentionState(normal(B, S, E, like=torch.float32), table[:, 0], table[:, 1])
    return Problem(case, tensors, options, state, normal(B, T, E), normal(B, S, E, like=torch.float32))


def public_op(
    problem: Problem, tensors: dict[str, Tensor], state: AttentionState | None
) -> tuple[Tensor, Tensor | None]:
    """The op's output, and the sum of the state that leaves, if one does."""
    arguments: dict[str, Any] = tensors | problem.options
    if problem.case.chunk is None:
        return quadratic_attention(**arguments), None
    if problem.case.returns_state:
        out, left = mixed_chunk_attention(**arguments, state=state, return_state=True)
        return out, left.sum
    return mixed_chunk_attention(**arguments, state=state), None


def runs_kernels(case: Case, dtype: torch.dtype) -> bool:
    """Whether the op, left to itself or to FLASH_OP, chooses kernels for such a case."""
    op = "quadratic_attention" if case.chunk is None else "mixed_chunk_attention"
    return dispatch.use_kernel(op, DEVICE.type, dtype, case.E, case.S, case.chunk)


def kernels(problem: Problem, tensors: dict[str, Tensor], state: AttentionState | None) -> tuple[Tensor, Tensor | None]:
    """`public_op`, after making sure that it runs kernels, where there is a GPU."""
    assert runs_kernels(problem.case, tensors["uvz"].dtype) or DEVICE.type != "cuda"
    return public_op(problem, tensors, state)


def exactly(problem: Problem) -> dict[str, Tensor]:
    """What the reference gives in float64."""
    return measure(public_op, problem.to(torch.float64))


def measure(implementation: Callable[..., tuple[Tensor, Tensor | None]], problem: Problem) -> dict[str, Tensor]:
    """Run an implementation forward and backward and return by name all that must be right.

    uvz's gradient is cut into u, v and z, those of gamma and beta into the local and the linear part's heads.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    state = problem.state
    wanted = dict(leaves)
    if state is not None:
        state = state._replace(sum=state.sum.detach().requires_grad_())
        wanted["state"] = state.sum
    out, left = implementation(problem, leaves, state)
    results, grads = [out], [problem.grad_out]
    if left is not None:
        results, grads = [out, left], [problem.grad_out, problem.grad_left.to(left.dtype)]
    gradients = dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), grads), strict=True))
    E, S = problem.case.E, problem.case.S
    found = {"out": out.detach()} | ({} if left is None else {"state out": left.detach()})
    names, widths = ("u", "v", "z"), (E, E, S)
    found |= {f"grad {name}": x for name, x in zip(names, gradients.pop("uvz").split(widths, -1), strict=True)}
    for name, gradient in gradients.items():
        if name in ("gamma", "beta"):
            parts = zip(("quad", "lin"), gradient.split(2), strict=False)
            found |= {f"grad {name} {part}": rows for part, rows in parts}
        else:
            found[f"grad {name}"] = gradient
    return found


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """‖x − exact‖ / ‖exact‖ by name; NaN and infinity count as infinite, and what is exactly 0 must be 0."""
    assert found.keys() == exact.keys()
    errors = {}
    for name, x in found.items():
        assert x.shape == exact[name].shape, name
        size, distance = exact[name].norm().item(), (x.double() - exact[name]).norm().item()
        relative = distance / size if size else (0.0 if distance == 0 else float("inf"))
        errors[name] = relative if relative == relative else float("inf")
    return errors
