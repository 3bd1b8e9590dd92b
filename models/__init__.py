"""From a batch to a loss: encoders, MoCo with its queue, and the λ-weighted losses."""
