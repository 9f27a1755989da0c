"""What is right: plain references of every operation, and how closely the fast ones must agree with them."""
