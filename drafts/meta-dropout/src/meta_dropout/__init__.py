"""Meta dropout."""
