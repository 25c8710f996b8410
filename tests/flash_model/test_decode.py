"""Generation token by token against the parallel pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_model.config import ModelConfig
from flash_model.decode import ChunkMemory, prefill, step
from flash_model.lm import FlashLM, build_model

C = 8


def lively_model(**change: Any) -> FlashLM:
    """A float64 model whose parameters are so large that a wrong term anywhere shows."""
    config = ModelConfig(**{"vocab_size": 30, "d_model": 16, "n_layers": 3, "qk_dim": 8, "chunk_size": C, **change})
    model = build_model(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def some_tokens(T: int) -> Tensor:
    return torch.randint(0, 30, (2, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "scalenorm", "scaled_sin": False},
        {"position_bias": "rotary"},
        {"architecture": "flash_quad", "norm_length": 64},
        {"architecture": "flash_quad", "norm_length": 600},
    ],
)
@pytest.mark.parametrize("prompt_length", [1, C - 1, C, C + 1, 3 * C + 5])
def test_steps_equal_the_parallel_pass(change: dict[str, Any], prompt_length: int) -> None:
    model, tokens = lively_model(**change), some_tokens(5 * C)
    with torch.no_grad():
        expected = model(tokens)
    logits, state = prefill(model, tokens[:, :prompt_length])
    torch.testing.assert_close(logits, expected[:, prompt_length - 1], rtol=1e-9, atol=1e-9)
    for t in range(prompt_length, 5 * C):
        logits = step(model, tokens[:, t], state)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-9, atol=1e-9)


def test_memory_of_flash_does_not_grow() -> None:
    model, tokens = lively_model(), some_tokens(5 * C)
    _, state = prefill(model, tokens[:, :1])
    held = []
    for t in range(1, 5 * C):
        step(model, tokens[:, t], state)
        held.append(state.nbytes())
    assert max(held[: 2 * C]) == max(held)
    S, E, B = 8, 32, 2
    assert max(held) == 3 * B * (2 * S * E + C * (S + E)) * 8
    assert all(isinstance(memory, ChunkMemory) and memory.quad_k.shape[1] == C for memory in state.layers)
    _, long_state = prefill(model, some_tokens(20 * C + 3))
    assert long_state.nbytes() == max(held)


def test_memory_of_flash_quad_grows_by_one_key_and_value_a_token_and_ends_at_norm_length() -> None:
    model, tokens = lively_model(architecture="flash_quad", norm_length=12), some_tokens(13)
    _, state = prefill(model, tokens[:, :10])
    before = state.nbytes()
    step(model, tokens[:, 10], state)
    assert state.nbytes() - before == 3 * 2 * (8 + 32) * 8
    step(model, tokens[:, 11], state)
    with pytest.raises(ValueError, match="norm_length"):
        step(model, tokens[:, 12], state)
    with pytest.raises(ValueError, match="norm_length"):
        prefill(model, tokens)


def test_sequences_of_a_state_do_not_share_memory_with_the_prompt() -> None:
    """Two continuations from two prefills of one prompt do not disturb each other."""
    model, tokens = lively_model(), some_tokens(2 * C)
    _, first = prefill(model, tokens[:, :C])
    _, second = prefill(model, tokens[:, :C])
    for t in range(C):
        step(model, tokens[:, t] * 0, first)
    expected = step(model, tokens[:, C], prefill(model, tokens[:, :C])[1])
    assert torch.equal(step(model, tokens[:, C], second), expected)


def test_bfloat16_decoding_stays_close() -> None:
    model, tokens = lively_model(), some_tokens(3 * C)
    narrow = build_model(model.config, dtype=torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = narrow(tokens)[:, -1].float()
    _, state = prefill(narrow, tokens[:, :5])
    for t in range(5, 3 * C):
        logits = step(narrow, tokens[:, t], state)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(ValueError, match="causal"):
        prefill(lively_model(causal=False), some_tokens(4))
    with pytest.raises(ValueError, match="at least one token"):
        prefill(lively_model(), some_tokens(4)[:, :0])
    with pytest.raises(ValueError, match="at least one token"):
        prefill(lively_model(), some_tokens(4)[:0])


def test_a_step_reads_one_token_of_each_sequence() -> None:
    model, tokens = lively_model(), some_tokens(4)
    _, state = prefill(model, tokens)
    for wrong in (tokens[:1, 0], tokens[:, :1], tokens.flatten()[:3]):
        with pytest.raises(ValueError, match=r"token must have shape \(B,\) = \(2,\)"):
            step(model, wrong, state)
    assert state.position == 4
    assert torch.equal(step(model, tokens[:, 0], state), step(model, tokens[:, 0], prefill(model, tokens)[1]))
