"""Audit: proof that a run read every example exactly once."""
