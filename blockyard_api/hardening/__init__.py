"""What an operator puts in place as root to confine workers further; nothing here runs while apps are served."""
