"""Bundles: what a deployer sends, made safe to keep and to run."""
