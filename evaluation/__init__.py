"""Evaluation: encodes images and texts with a model and measures retrieval, classification and localization."""
