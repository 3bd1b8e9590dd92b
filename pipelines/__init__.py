"""A compiled set in, batches of views and mixtures on the training device out."""
