"""Structural pruning that reads the new task's data: channel groups, exact surgery, costs (a draft).

After Song et al., "Rapid Structural Pruning of Neural Networks with Set-based Task-Adaptive Meta-Pruning", 2020.
"""
