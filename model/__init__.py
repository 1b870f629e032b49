"""What a path is made of: topology, transformer, composing and splitting a path, blob store, export."""
