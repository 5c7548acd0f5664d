"""The measures of the tasks as HuggingFace `evaluate` modules: `evaluate.load("evaluation/metrics/NAME")`."""
