"""Model FLOPs of the ops, by formula. Without torch: who only reads a configuration need not load it."""


def mixed_chunk_flops(tokens: int, seq_len: int, qk_dim: int, value_dim: int, chunk_size: int, causal: bool) -> int:
    """Return the model FLOPs of the forward op for `tokens` tokens in sequences of seq_len.

    A token costs 2·C·(S + E) in its chunk, half of it when causal, and 4·S·E in the linear part (paper, section 2).
    Documents are not looked at.
    """
    block = min(chunk_size, seq_len)
    local = 2 * block * (qk_dim + value_dim)
    return tokens * ((local // 2 if causal else local) + 4 * qk_dim * value_dim)


def quadratic_flops(tokens: int, seq_len: int, qk_dim: int, value_dim: int, causal: bool) -> int:
    """Return the model FLOPs of the forward op: 2·seq_len·(S + E) for each of the tokens, half of it when causal."""
    total = tokens * 2 * seq_len * (qk_dim + value_dim)
    return total // 2 if causal else total
