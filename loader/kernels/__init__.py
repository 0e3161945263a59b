"""Ways to run the experts (`known`), how they are configured (`configs`), and what was measured (`tuned`).

The latter two need no torch, and nothing is imported here, so that a decision can look at tables without it.
"""
