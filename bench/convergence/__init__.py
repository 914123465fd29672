"""`make convergence`: what keeping replicas together, or not, costs in held-out loss."""
