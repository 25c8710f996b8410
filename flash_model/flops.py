"""FLOPs of the ops by formula, and what GPUs can do by data sheet. Without torch: who only plans need not load it."""

DATA_SHEET_TFLOPS = {
    "H100 PCIe": 756.0,
    "H800 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}
"""Dense bfloat16 products, TFLOP/s, by a part of the GPU's name: the first that fits."""


def data_sheet_tflops(gpu: str) -> float | None:
    """Return the dense bfloat16 rate of a GPU by the name that its driver gives it; None where it is not known."""
    return next((rate for name, rate in DATA_SHEET_TFLOPS.items() if name in gpu), None)


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
