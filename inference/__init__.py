"""One path at a time: router and engine."""
