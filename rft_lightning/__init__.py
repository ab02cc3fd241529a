"""Visual reinforcement fine-tuning as PyTorch Lightning modules with a dataset zoo."""
