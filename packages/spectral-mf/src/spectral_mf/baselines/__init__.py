"""What the paper compares to, and the exact methods, each a function ``(A, b, ...) -> LogPartition``."""
