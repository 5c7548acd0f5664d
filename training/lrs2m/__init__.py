"""Builds the long and short caption data set: `python -m training.lrs2m.build --config RECIPE --output DIR`."""
