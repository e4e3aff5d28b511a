"""capsexp: a config-driven experiment runner for capsule networks."""
