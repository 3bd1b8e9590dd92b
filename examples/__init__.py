"""Complete examples, small enough for two CPU cores."""
