"""Booted Linux guests whose disks are served by nbdimg."""
