"""Complete uses of the project, small enough for two CPU cores."""
