"""VHDX, Hyper-V's format, version 1: fixed, dynamic and differencing."""
