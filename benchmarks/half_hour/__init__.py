"""The first half hour on a GPU: all that this project claims of one, measured by a single command."""
