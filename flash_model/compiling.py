"""What torch.compile is told about these models."""

import torch._functorch.config


def recompute_norms(recompute: bool) -> None:
    """Have layers that are compiled from now on recompute the outputs of their norms in backward, or keep them.

    Recomputing keeps d_model numbers less for each token and layer, a ninth of what a FLASH layer keeps, and costs
    reading its input, which is kept anyway. By its own rule the compiler would keep what a product reads in backward.
    """
    torch._functorch.config.ban_recompute_materialized_backward = not recompute
