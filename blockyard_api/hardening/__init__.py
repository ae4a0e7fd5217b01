"""What an administrator puts around the pair: system call filter, firewall, AppArmor."""
