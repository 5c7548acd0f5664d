"""Sources of records: tables, images, labels, vector files."""
