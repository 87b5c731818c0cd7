"""Crash consistency: each format's writer against every state that a crash can leave."""
