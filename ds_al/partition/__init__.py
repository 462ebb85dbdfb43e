"""How a network is cut into stages: plans, and what layers cost."""
