"""Text to token shards to batches. Knows nothing of models, DeepSpeed or MLflow."""
