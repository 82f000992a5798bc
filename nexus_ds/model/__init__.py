"""What a Nexus model computes, in plain PyTorch: router, losses, experts, loss head, scores."""
