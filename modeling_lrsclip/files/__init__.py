"""Files read and written in one way by all rooms: hashes, atomic writes, caches, tables, configurations."""
