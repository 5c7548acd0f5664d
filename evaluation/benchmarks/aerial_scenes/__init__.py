"""The embedded data: drawn aerial scenes with a long and a short caption each: `python -m evaluation.benchmarks.aerial_scenes`."""
