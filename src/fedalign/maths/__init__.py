"""The equations: pure functions on tensors, torch only."""
