"""Files that are complete or absent, and what is shown while one waits."""
