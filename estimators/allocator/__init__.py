"""torch's CUDA caching allocator, and what it reserves in the first steps."""
