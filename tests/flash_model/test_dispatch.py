"""Which implementation an op is given, and what is said about it: decided from names and numbers, without a GPU."""

import importlib.util
import logging
from collections.abc import Generator

import pytest
import torch

from flash_model.ops import dispatch

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _nothing_said_yet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.delenv("FLASH_OP", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._decide.cache_clear()
    caplog.set_level(logging.INFO, logger="flash_model.ops")
    yield
    dispatch._decide.cache_clear()


def on_cuda(
    dtype: torch.dtype = torch.bfloat16, value_dim: int = 64, qk_dim: int = 64, chunk_size: int | None = 128
) -> bool:
    return dispatch.use_kernel("an op", "cuda", dtype, value_dim, qk_dim, chunk_size)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("chunk_size", [128, 256, 512, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_run_on_cuda_and_say_so_once(
    dtype: torch.dtype, chunk_size: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_cuda(dtype, 1536, 128, chunk_size)
    assert on_cuda(dtype, 1536, 128, chunk_size)
    assert [record.getMessage() for record in caplog.records] == ["an op: Triton kernels"]
    monkeypatch.setenv("FLASH_OP", "reference")
    assert not on_cuda(dtype, 1536, 128, chunk_size)
    assert caplog.messages[1:] == ["an op: reference, as FLASH_OP says"]
    monkeypatch.setenv("FLASH_OP", "triton")
    assert on_cuda(dtype, 1536, 128, chunk_size)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("E = 96", {"value_dim": 96}),
        ("S = 32", {"qk_dim": 32}),
        ("S = 320", {"qk_dim": 320}),
        ("chunk_size = 64", {"chunk_size": 64}),
        ("chunk_size = 1024", {"chunk_size": 1024}),
    ],
)
def test_what_has_no_kernel_runs_the_reference_and_warns_once(
    reason: str, change: dict[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not on_cuda(**change)  # type: ignore[arg-type]
    assert not on_cuda(**change)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    monkeypatch.setenv("FLASH_OP", "triton")
    with pytest.raises(ValueError, match=f"FLASH_OP=triton: .*{reason}"):
        on_cuda(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float64), ("cpu", torch.bfloat16)])
def test_no_warning_where_the_reference_is_expected(
    device: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    assert not dispatch.use_kernel("an op", device, dtype, 64, 64, 128)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_interpreter_runs_kernels_on_the_cpu_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not dispatch.use_kernel("an op", "cpu", torch.float32, 64, 64, 128)
    monkeypatch.setenv("FLASH_OP", "triton")
    assert dispatch.use_kernel("an op", "cpu", torch.float32, 64, 64, 128)


def test_an_unknown_implementation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_OP", "cuda")
    with pytest.raises(ValueError, match='FLASH_OP must be "triton" or "reference"'):
        on_cuda()
