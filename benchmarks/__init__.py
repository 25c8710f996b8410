"""Speed of the op, the training step and the pipeline, each one table with its peers beside it."""
