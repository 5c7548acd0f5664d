"""Sources of captioned images, made into batches in an order that every run can repeat."""
