"""The mathematics of FLASH: gated attention units and mixed chunk attention. Knows nothing of data, DeepSpeed or MLflow."""
