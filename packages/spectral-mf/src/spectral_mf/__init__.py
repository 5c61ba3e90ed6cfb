"""Partition functions of Ising models."""
