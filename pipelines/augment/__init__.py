"""Augmentation: random crop boxes and parameters, the photometric stage, mixing."""
