"""Reading and writing files: in one step, and never half."""
