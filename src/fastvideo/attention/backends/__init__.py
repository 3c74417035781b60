"""Attention backends: one file each, behind the contract in `abstract`."""
