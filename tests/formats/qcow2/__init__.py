"""Tests of the qcow2 driver."""
