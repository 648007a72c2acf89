"""What every operator shares: choosing a backend, checking arguments, and the torch.library registration."""
