"""A batch in, a loss out: encoders, MoCo with its queue, and the λ-weighted losses."""
