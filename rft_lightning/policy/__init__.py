"""The policy: loading, families, log-probs and rollouts."""
