"""The control plane over HTTP: routes, shapes, and errors turned into responses."""
