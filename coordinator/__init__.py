"""Who does what, and the modules: the state machine, stages, executor and outer optimizer, gRPC service."""
