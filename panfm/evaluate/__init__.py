"""Value of a frozen embedding: features, linear probes, the missing-organ grid, the statistics reference."""
