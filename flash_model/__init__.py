"""The mathematics of FLASH: gated attention units, mixed chunk attention. It knows no data, DeepSpeed or MLflow."""
