"""The same task with several methods at matched trainable parameters."""
