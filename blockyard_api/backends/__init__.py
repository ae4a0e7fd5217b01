"""What runs workers, seen from the API: a spawner's socket, and each worker's own."""
