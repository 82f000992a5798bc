"""What `compare` sets beside each other, the work that makes it, and what came out."""
