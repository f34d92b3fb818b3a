"""Bridges to other packages; each imports its package when it is used."""
