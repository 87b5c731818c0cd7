"""Helpers shared by the tests: processes, a raw client, fault injection, models."""
