"""What a run's metrics say about its health: rules, and the verdicts that they give."""
