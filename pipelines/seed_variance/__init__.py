"""Tools of other programs against seeds that look alike, to be measured beside noise optimization."""
