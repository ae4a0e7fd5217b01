"""Who is calling, and what they may do to an app."""
