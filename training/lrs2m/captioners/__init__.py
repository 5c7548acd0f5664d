"""Engines that write captions, the prompts they are asked with, and the checks of their answers."""
