"""The machine the API runs on: systemd's notification socket, descriptor store and D-Bus, and cgroup accounting."""
