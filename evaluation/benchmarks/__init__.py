"""Data of the benchmarks: where it comes from, its classes and prompts."""
