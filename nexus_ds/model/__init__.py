"""What a Nexus model is made of: router, losses, layers, names, checkpoints."""
