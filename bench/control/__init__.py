"""What gateway, scheduler, node agents and Redis cost: CPU time per request, per token and per op."""
