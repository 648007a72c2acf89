"""What gated attention is given: gate, values, queries and keys of one projection, in one pass."""
