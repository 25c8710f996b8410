"""The learning rate: a pure function of the tokens seen."""

import math

from launch.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of step `step` (0-based), taken at the middle of the step's tokens.

    The middle keeps the first step of a warm-up and the last of a decay above zero, and makes the curve over tokens
    independent of the batch.
    """
    train, schedule = config.train, config.schedule
    tokens = (step + 0.5) * train.tokens_per_step
    total = config.steps * train.tokens_per_step
    if tokens < schedule.warmup_tokens:
        return config.optimizer.lr * tokens / schedule.warmup_tokens
    decay_start = schedule.warmup_tokens if schedule.decay_tokens is None else total - schedule.decay_tokens
    if tokens <= decay_start:
        return config.optimizer.lr
    progress = (tokens - decay_start) / (total - decay_start)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return config.optimizer.lr * (schedule.final_fraction + (1 - schedule.final_fraction) * remaining)
