"""Where records come from: tables, images, labels, vector files."""
