"""Visitors' sessions: who is pinned to which worker, and the gate that decides about every request."""
