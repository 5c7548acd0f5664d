"""Parts of the ablation command."""
