"""This process and machine: versions, origin of results, allocator."""
