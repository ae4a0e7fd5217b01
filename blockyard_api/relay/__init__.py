"""The data plane: HTTP and WebSocket bytes between a browser and a worker's Unix socket."""
