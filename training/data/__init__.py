"""From sources of captioned images to batches, in an order that every run can repeat."""
