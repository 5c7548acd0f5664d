"""Where each benchmark's data comes from."""
