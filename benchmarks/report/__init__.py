"""From the JSON of the benchmarks to one page of all figures, and to the README's block of them."""
