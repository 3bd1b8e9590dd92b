"""Inner loops that numba compiles to machine code."""
