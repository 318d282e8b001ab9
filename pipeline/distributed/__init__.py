"""Ranks: who they are, what they agree on, and how they end."""
