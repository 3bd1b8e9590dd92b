"""The first half hour on a GPU: one command measures everything this project claims about GPUs."""
