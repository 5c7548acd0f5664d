"""Search by description over georeferenced imagery of one's own."""
