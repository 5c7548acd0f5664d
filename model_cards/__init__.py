"""Model cards: results.json and a training record -> a validated card; pushing a checkpoint to the Hub with it."""
