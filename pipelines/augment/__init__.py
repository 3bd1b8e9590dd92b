"""From crops to normalised views and mixtures."""
