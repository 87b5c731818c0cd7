"""Tests of the VHDX driver."""
