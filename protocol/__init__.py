"""What is said on the wire: the .proto, its committed stubs, task specs, tensor streams, channels."""
