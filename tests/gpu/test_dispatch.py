"""Which implementation runs on a GPU, and what is said about it."""

import logging
from collections.abc import Generator

import pytest
import torch

from flash_model.ops import dispatch
from tests.gpu.comparison import Case, draw, exactly, measure, public_op, relative_errors, runs_kernels

pytestmark = pytest.mark.gpu

SUPPORTED = (Case(64, 64, 200, chunk=128), Case(64, 64, 200, chunk=None))
UNSUPPORTED = {
    "S = 32": Case(32, 64, 200, chunk=128),
    "E = 96": Case(64, 96, 200, chunk=128),
    "chunk_size = 64": Case(64, 64, 200, chunk=64),
    "S = 96": Case(96, 64, 200, chunk=None),
}


@pytest.fixture(autouse=True)
def _nothing_said_yet(caplog: pytest.LogCaptureFixture) -> Generator[None]:
    dispatch._decide.cache_clear()
    caplog.set_level(logging.INFO, logger="flash_model.ops")
    yield
    dispatch._decide.cache_clear()


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_has_no_kernel_runs_the_reference_and_warns_once(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    problem = draw(UNSUPPORTED[reason], torch.float32)
    found, exact = measure(public_op, problem), exactly(problem)
    measure(public_op, problem)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([message for message in warnings if reason in message and "reference" in message]) == 1
    assert not [message for message in warnings if reason not in message and "float64" not in message]
    assert max(relative_errors(found, exact).values()) < 1e-5


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_kernels_cannot_be_forced_on_what_has_none(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_OP", "triton")
    with pytest.raises(ValueError, match=reason):
        measure(public_op, draw(UNSUPPORTED[reason], torch.float32))


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_it_is_said_once_which_one_runs(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw(case, torch.bfloat16)
    outs = []
    for forced, implementation in (("", "kernels"), ("triton", "kernels"), ("reference", "reference")):
        monkeypatch.setenv("FLASH_OP", forced)
        caplog.clear()
        outs.append(measure(public_op, problem)["out"])
        measure(public_op, problem)
        assert [record.levelno for record in caplog.records] == [logging.INFO]
        assert implementation in caplog.records[0].getMessage()
        assert runs_kernels(case, torch.bfloat16) == (implementation == "kernels")
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_an_unknown_implementation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_OP", "cuda")
    with pytest.raises(ValueError, match="FLASH_OP"):
        measure(public_op, draw(SUPPORTED[0], torch.float32))
