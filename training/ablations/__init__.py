"""What the ablation command is made of."""
