"""Copies between a device, host memory and disks, and their order."""
