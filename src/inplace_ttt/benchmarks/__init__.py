"""What the fast weights cost, measured side by side in one run."""
