"""What the verbs of the command do: settings, training, reloading, merging."""
