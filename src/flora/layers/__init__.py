"""Which layers there are, and every way to run each of them with its update."""
