"""Starting from the task: the gradient of the frozen weights says where an adapter begins and where its ranks go."""
