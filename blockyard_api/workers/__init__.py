"""Workers: their life from spawn to end, their logs, and which visitor gets which."""
