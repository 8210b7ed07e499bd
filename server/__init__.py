"""The coordinator: gRPC service, registry, task board, and the grid a ServerApp talks to."""
