"""Training machinery: the DeepSpeed engine, training states, signals and metrics."""
