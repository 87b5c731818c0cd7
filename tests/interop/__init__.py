"""Tests against real NBD clients and servers of other projects."""
