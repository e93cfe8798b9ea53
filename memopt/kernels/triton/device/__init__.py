"""What runs on the device: kernels, and the functions of which they are made."""
